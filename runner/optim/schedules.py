"""The catalogue of learning-rate schedules: options, defaults and ranges. Free of jax until `build`.

A schedule maps completed steps to a learning rate. Each of ours begins with a linear warm-up from lr / (warm-up + 1)
to lr, so that the first update is not lost on a rate of zero. All are callables, the constant one too: what the
optimizer keeps in the state is then the same under each of them, and a run can be continued under another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Interval

if TYPE_CHECKING:
    import jax
    import optax

Fraction = Annotated[float, Interval(ge=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True)
class WarmUp(ABC):
    """A linear rise first; with neither of its fields set there is none.

    Attributes:
        warmup_steps: how long the warm-up is, in steps.
        warmup_fraction: how long the warm-up is, as a share of train.steps.
    """

    kind: str
    warmup_steps: Annotated[int, Ge(0)] | None = None
    warmup_fraction: Fraction | None = None

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction:g} both say how long the "
                "warm-up is; set one of them to null"
            )

    def build(self, lr: float, num_steps: int) -> optax.Schedule:
        """Return the learning rate by completed steps: up to `lr` over the warm-up, then what comes `after` it."""
        import optax

        warmup = self.warmup(num_steps)
        # join_schedules starts it at zero again when the warm-up ends.
        after = self.after(lr, warmup, num_steps)
        rise = optax.linear_schedule(lr / (warmup + 1), lr, warmup)
        return optax.join_schedules([rise, after], [warmup]) if warmup else after

    def warmup(self, num_steps: int) -> int:
        """Return the length of the warm-up in steps, no longer than training."""
        if self.warmup_fraction is not None:
            return round(self.warmup_fraction * num_steps)
        return min(self.warmup_steps or 0, num_steps)

    @abstractmethod
    def after(self, lr: float, warmup: int, num_steps: int) -> optax.Schedule:
        """Return the learning rate by steps since the end of the warm-up, which took `warmup` steps."""


@dataclass(frozen=True, kw_only=True)
class Constant(WarmUp):
    """lr, for ever. Choose it to find a learning rate, or where the end is not known."""

    kind: Literal["constant"] = "constant"

    def after(self, lr: float, warmup: int, num_steps: int) -> optax.Schedule:
        """Return lr at every step."""
        import optax

        return optax.constant_schedule(lr)


@dataclass(frozen=True, kw_only=True)
class Cosine(WarmUp):
    """Half a cosine down to lr × end_lr_fraction at the last step (Loshchilov & Hutter 2017, arXiv:1608.03983).

    Attributes:
        end_lr_fraction: what is left of lr at the last step.
    """

    kind: Literal["cosine"] = "cosine"
    end_lr_fraction: Fraction = 0.1

    def after(self, lr: float, warmup: int, num_steps: int) -> optax.Schedule:
        """Return half a cosine from lr down to its fraction at the last step."""
        import optax

        # At least 1, for optax refuses zero steps, and a run may be all warm-up.
        return optax.cosine_decay_schedule(lr, max(num_steps - warmup, 1), self.end_lr_fraction)


@dataclass(frozen=True, kw_only=True)
class Linear(WarmUp):
    """A straight line down to lr × end_lr_fraction at the last step (as BERT has it; Devlin 2018, arXiv:1810.04805).

    Attributes:
        end_lr_fraction: what is left of lr at the last step.
    """

    kind: Literal["linear"] = "linear"
    end_lr_fraction: Fraction = 0.0

    def after(self, lr: float, warmup: int, num_steps: int) -> optax.Schedule:
        """Return a straight line from lr down to its fraction at the last step."""
        import optax

        return optax.linear_schedule(lr, lr * self.end_lr_fraction, max(num_steps - warmup, 1))


@dataclass(frozen=True, kw_only=True)
class Wsd(WarmUp):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): lr, and a short way down at the end.

    The way down is lr × (1 - (1 - end_lr_fraction) × √x), x from 0 to 1, the best of several shapes in Hägele et al.
    2024 (arXiv:2405.18392). From a checkpoint before it begins, a run can be made longer as if it had been from the
    start.

    Attributes:
        decay_fraction: the share of train.steps, the last ones, that the way down takes.
        end_lr_fraction: what is left of lr at the last step.
    """

    kind: Literal["wsd"] = "wsd"
    decay_fraction: Annotated[float, Interval(gt=0.0, le=1.0)] = 0.2
    end_lr_fraction: Fraction = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_fraction is not None and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError(
                f"decay_fraction={self.decay_fraction:g} and warmup_fraction={self.warmup_fraction:g} are more than "
                "all steps together; make one of them smaller"
            )

    def after(self, lr: float, warmup: int, num_steps: int) -> optax.Schedule:
        """Return lr, and over the last steps the way down."""
        import jax.numpy as jnp

        begin = max(num_steps - warmup - round(self.decay_fraction * num_steps), 0)
        length = max(num_steps - warmup - begin, 1)

        def find_rate(step: jax.typing.ArrayLike) -> jax.Array:
            passed = jnp.clip((step - begin) / length, 0.0, 1.0)
            return lr * (1.0 - (1.0 - self.end_lr_fraction) * jnp.sqrt(passed))

        return find_rate


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(WarmUp):
    """lr × √(warm-up / step) after the warm-up (Vaswani et al. 2017, arXiv:1706.03762). It knows no last step."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"

    def after(self, lr: float, warmup: int, num_steps: int) -> optax.Schedule:
        """Return lr × √(warm-up / step)."""
        import jax.numpy as jnp

        # Without a warm-up it is lr at the first step, and falls from there.
        begin = max(warmup, 1)
        return lambda step: lr * jnp.sqrt(begin / jnp.maximum(step + warmup, begin))


@dataclass(frozen=True, kw_only=True)
class ExternalSchedule:
    """A learning-rate schedule of your own, or one of a library such as optax.

    The target is called by the names of its parameters: `lr`, `learning_rate`, `peak_value` and the like are optim.lr,
    `num_steps`, `total_steps`, `decay_steps` and the like are train.steps, and what has no such name is an option. It
    returns a function from completed steps to the learning rate. Where its first parameter is called `step` or `count`
    it is that function itself.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`, as in `optax:cosine_decay_schedule`.
        options: what it is called with by name, as in `+schedule.options.alpha=0.1`; they come before what a name says.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, lr: float, num_steps: int) -> optax.Schedule:
        """Return the learning rate by completed steps; raises ConfigError where the target gives something else."""
        from runner.optim.user_schedule import make_user_schedule

        return make_user_schedule(self.target, self.options, lr, num_steps)


Schedule = Constant | Cosine | Linear | Wsd | InverseSqrt | ExternalSchedule
