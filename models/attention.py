"""Attention itself: computed by XLA, or by cuDNN's flash attention (Dao et al. 2022, arXiv:2205.14135)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from models import Implementation
from models.scopes import ATTENTION_CONTEXT, tag

Heads = Float[Array, "batch seq heads head_dim"]

# The first generation of NVIDIA GPUs that cuDNN's flash attention runs on, Ampere.
LEAST_COMPUTE_CAPABILITY = 8.0


def tag_context(mixed: Heads, implementation: Implementation) -> Heads:
    """Return the values that attention mixed, tagged as `attn_ctx` where XLA computed them.

    Where cuDNN did, they stay as they are: the policy stores the outputs of its operation itself under that name
    (models.scopes.CheckpointPolicy). The backward pass reads the values and the statistics of the softmax from there,
    so a tagged copy would not spare the operation, and the values would be stored twice.
    """
    return mixed if implementation == "cudnn" else tag(mixed, ATTENTION_CONTEXT)


def check_implementation_available(implementation: Implementation) -> None:
    """Raise ValueError where this machine cannot compute attention in that way."""
    if implementation == "xla":
        return
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        raise ValueError(f"attention=cudnn needs an NVIDIA GPU, and this is a {device.platform}; choose attention=xla")
    if float(device.compute_capability) < LEAST_COMPUTE_CAPABILITY:
        raise ValueError(f"attention=cudnn needs an NVIDIA GPU from Ampere on, not a {device.device_kind}; choose xla")
