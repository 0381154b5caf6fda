"""Attention itself: computed by XLA, or by cuDNN's flash attention (Dao et al. 2022, arXiv:2205.14135)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from models.choices import Implementation
from models.scopes import ATTENTION_CONTEXT, tag

Heads = Float[Array, "batch seq heads head_dim"]


def tag_context(mixed: Heads, implementation: Implementation) -> Heads:
    """What attention mixed, with its tag where XLA computed it.

    Where cuDNN did, the outputs of its operation are stored for that name themselves (models.scopes.CheckpointPolicy): the backward
    pass reads the values and the statistics of the softmax from there, and a tagged copy would not save it from running
    the operation again. Tagged as well, the values would be stored twice.
    """
    return mixed if implementation == "cudnn" else tag(mixed, ATTENTION_CONTEXT)


def check_implementation_available(implementation: Implementation) -> None:
    """Raises ValueError where this machine cannot do it."""
    if implementation == "xla":
        return
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        raise ValueError(f"attention=cudnn needs an NVIDIA GPU, and this is a {device.platform}; choose attention=xla")
    if float(device.compute_capability) < 8.0:
        raise ValueError(f"attention=cudnn needs an NVIDIA GPU from Ampere on, not a {device.device_kind}; choose xla")
