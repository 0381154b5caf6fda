"""Attention itself: computed by XLA, or by cuDNN's flash attention (Dao et al. 2022, arXiv:2205.14135)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models import Implementation
from models.scopes import ATTENTION_CONTEXT, tag

Heads = Float[Array, "batch seq heads head_dim"]
# The number of the document that each token of a row belongs to; 0 is padding.
Segments = Int[Array, "batch seq"]

# The first generation of NVIDIA GPUs that cuDNN's flash attention runs on, Ampere.
LEAST_COMPUTE_CAPABILITY = 8.0


def tag_context(mixed: Heads, implementation: Implementation) -> Heads:
    """Return the values that attention mixed, tagged as `attn_ctx` where XLA computed them.

    Where cuDNN did, they stay as they are: the policy stores the outputs of its operation itself under that name
    (models.scopes.CheckpointPolicy). The backward pass reads the values and the statistics of the softmax from there,
    so a tagged copy would not spare the operation, and the values would be stored twice.
    """
    return mixed if implementation == "cudnn" else tag(mixed, ATTENTION_CONTEXT)


def find_visible(segments: Segments) -> Bool[Array, "batch 1 seq seq"]:
    """Return which tokens each token may attend to where a row holds several documents: those of its own."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def find_offsets(segments: Segments) -> Int[Array, "batch seq"]:
    """Return what is added to the index of each token in its row to make its position in its document."""
    index = jnp.arange(segments.shape[1])
    is_first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return -jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)


def check_implementation_available(implementation: Implementation) -> None:
    """Raise ValueError where this machine cannot compute attention in that way."""
    if implementation == "xla":
        return
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        raise ValueError(f"attention=cudnn needs an NVIDIA GPU, and this is a {device.platform}; choose attention=xla")
    if float(device.compute_capability) < LEAST_COMPUTE_CAPABILITY:
        raise ValueError(f"attention=cudnn needs an NVIDIA GPU from Ampere on, not a {device.device_kind}; choose xla")
