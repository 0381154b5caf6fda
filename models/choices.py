"""TODO docstring."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, MinLen

Count = Annotated[int, Ge(1)]
Counts = Annotated[tuple[Count, ...], MinLen(1)]  # one for each stage of a network
Positive = Annotated[float, Gt(0.0)]
Rate = Annotated[float, Interval(ge=0.0, lt=1.0)]
Implementation = Literal["xla", "cudnn"]


def check_head_size(attention: Implementation, head_dim: int) -> None:
    """Raises ValueError where cuDNN has no flash attention for heads of that size."""
    if attention == "cudnn" and (head_dim % 8 or head_dim > 256):
        raise ValueError(
            f"attention=cudnn takes heads of up to 256 numbers in multiples of 8, and width ÷ num_heads is {head_dim}; "
            "change one of them, or choose attention=xla"
        )
