"""Optimizers and schedules: option, default and range of each. Free of jax until `build`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

if TYPE_CHECKING:
    import optax

Positive = Annotated[float, Gt(0.0)]
NotNegative = Annotated[float, Ge(0.0)]
Momentum = Annotated[float, Interval(ge=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), linear warm-up, cosine decay, global-norm clipping.

    Weight decay touches matrices only: biases, norms and other vectors are left alone.
    """

    kind: Literal["adamw"] = "adamw"
    lr: Positive = 4e-3
    warmup_steps: Annotated[int, Ge(0)] = 20
    end_lr_fraction: Annotated[float, Interval(ge=0.0, le=1.0)] = 0.1
    weight_decay: NotNegative = 0.1
    b1: Momentum = 0.9
    b2: Momentum = 0.99
    clip_norm: Positive | None = 1.0

    def schedule(self, num_steps: int) -> optax.Schedule:
        """Learning rate by completed steps: 0 → lr over the warm-up, then a cosine to lr × end_lr_fraction."""
        import optax

        warmup = min(self.warmup_steps, num_steps)
        cosine = optax.cosine_decay_schedule(self.lr, max(num_steps - warmup, 1), self.end_lr_fraction)
        rise = optax.linear_schedule(self.lr / (warmup + 1), self.lr, warmup)
        return optax.join_schedules([rise, cosine], [warmup]) if warmup else cosine

    def build(self, schedule: optax.Schedule, decays: Callable[[Any], Any]) -> optax.GradientTransformation:
        """The transformation; `decays` maps parameters to booleans, True where weight decay applies."""
        import optax

        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(
            clip, optax.adamw(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=decays)
        )


Optim = AdamW
