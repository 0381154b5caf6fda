"""The peak of devices, in dense bfloat16 FLOP/s, for the share of it that training uses (MFU). No jax.

MFU is defined with the FLOPs that a step needs, without those that are done again (PaLM, arXiv:2204.02311, appendix B).
A device whose name is not here has no peak: a share of a guess would look like a measurement. A slice of a GPU (MIG)
has a name of its own, and so is not taken for a whole one.
"""

from __future__ import annotations

# jax's `device_kind` → peak of one such device. Vendors' sheets often give twice as much, which holds for matrices that
# are half zeros (sparsity).
PEAK_FLOPS = {
    # NVIDIA A100 datasheet, 2021: 312 TFLOPS.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-PCIE-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # NVIDIA H100 datasheet, 2023: 1,979 (SXM), 1,513 (PCIe) and 1,671 (NVL) TFLOPS with sparsity.
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    # NVIDIA GH200 datasheet, 2023: 1,979 TFLOPS with sparsity.
    "NVIDIA GH200 480GB": 989e12,
    # NVIDIA H200 datasheet, 2024: 1,979 (SXM) and 1,671 (NVL) TFLOPS with sparsity.
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    # NVIDIA HGX B200 and GB200 NVL72 datasheets, 2024: 36 PFLOPS for 8 and 360 for 72, with sparsity.
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    # Google Cloud TPU documentation, "System architecture" of each version, a chip; jax has two names for some.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def find_peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of one device by jax's name of it; None where nobody has written it down."""
    return PEAK_FLOPS.get(device_kind)
