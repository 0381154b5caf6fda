"""The catalogue of optimizers: options, defaults and ranges. Free of jax until `build`.

All but a user's own have these fields in common:

- lr: the learning rate at the end of the warm-up; runner/optim/schedules.py says how it goes on.
- clip_norm: the gradient is first clipped to this global norm; null: not at all.
- weight_decay: touches matrices and kernels only (runner/optim/parameter_groups.py).
- ema: keeps an average of the weights beside them, with this decay (runner/train/step.py), which evaluations and
  exports can use; null: no average.
- groups: parameters with a learning rate or a weight decay of their own (runner/optim/grouped_updates.py), by names
  that say what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from models.name_patterns import Patterns

if TYPE_CHECKING:
    import optax

    from runner.types import Params

Positive = Annotated[float, Gt(0.0)]
NonNegative = Annotated[float, Ge(0.0)]
Momentum = Annotated[float, Interval(ge=0.0, lt=1.0)]
OpenFraction = Annotated[float, Interval(gt=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are updated with a learning rate or a weight decay of their own.

    Attributes:
        match: patterns over their paths, as `[head]`, `[bias]` or `["embed*"]`.
        lr: their learning rate is so many times the one that the schedule gives.
        weight_decay: theirs, of matrices and kernels only; null: the optimizer's.
    """

    match: Annotated[Patterns, MinLen(1)]
    lr: Positive = 1.0
    weight_decay: NonNegative | None = None


Groups = Mapping[str, ParameterGroup]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101). The default that rarely disappoints.

    Attributes:
        lr: learning rate at the end of the warm-up; the schedule says how it goes on.
        weight_decay: of matrices and kernels only, times the learning rate.
        b1: decay of the average of gradients.
        b2: decay of the average of their squares.
        clip_norm: the gradient is first clipped to this global norm; null: not at all.
        ema: keep an average of the weights as well, with this decay, such as 0.999; null: none.
        groups: parameters that are updated in a manner of their own, by a name for each group.
    """

    kind: Literal["adamw"] = "adamw"
    lr: Positive = 4e-3
    weight_decay: NonNegative = 0.1
    b1: Momentum = 0.9
    b2: Momentum = 0.99
    clip_norm: Positive | None = 1.0
    ema: OpenFraction | None = None
    # It has no hash of its own, and all else of an optimizer is hashed.
    groups: Groups = field(default_factory=dict, hash=False)

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """Return the transformation of gradients into updates, for a learning rate by steps."""
        import optax

        from runner.optim.parameter_groups import decay_mask

        adamw = optax.adamw(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=decay_mask)
        return optax.chain(_clip_gradients(self.clip_norm), adamw)


@dataclass(frozen=True, kw_only=True)
class Lion:
    """Lion, the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675): half the memory of AdamW.

    Its updates are larger: as the paper says, a learning rate 3-10 times smaller than AdamW's, and a weight decay as
    many times larger.

    Attributes:
        b1: share of the momentum in what the sign is taken of.
        b2: decay of the momentum itself.
    """

    kind: Literal["lion"] = "lion"
    lr: Positive = 4e-4
    weight_decay: NonNegative = 1.0
    b1: Momentum = 0.9
    b2: Momentum = 0.99
    clip_norm: Positive | None = 1.0
    ema: OpenFraction | None = None
    # It has no hash of its own, and all else of an optimizer is hashed.
    groups: Groups = field(default_factory=dict, hash=False)

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """Return the transformation of gradients into updates, for a learning rate by steps."""
        import optax

        from runner.optim.parameter_groups import decay_mask

        lion = optax.lion(schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=decay_mask)
        return optax.chain(_clip_gradients(self.clip_norm), lion)


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """SGD with momentum (Sutskever et al. 2013), as ResNets are trained (He et al. 2016, arXiv:1512.03385).

    Attributes:
        weight_decay: the L2 penalty of those papers: added to the gradient, before the momentum.
        momentum: decay of the sum of gradients.
        nesterov: look one step of the momentum ahead.
    """

    kind: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    weight_decay: NonNegative = 1e-4
    momentum: Momentum = 0.9
    nesterov: bool = True
    clip_norm: Positive | None = None
    ema: OpenFraction | None = None
    # It has no hash of its own, and all else of an optimizer is hashed.
    groups: Groups = field(default_factory=dict, hash=False)

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """Return the transformation of gradients into updates, for a learning rate by steps."""
        import optax

        from runner.optim.parameter_groups import decay_mask

        # Before the momentum, which makes it the L2 penalty and not a decoupled decay.
        decayed = optax.add_decayed_weights(self.weight_decay, mask=decay_mask)
        return optax.chain(_clip_gradients(self.clip_norm), decayed, optax.sgd(schedule, self.momentum, self.nesterov))


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): rows and columns of second moments, hardly any memory.

    Layers stacked in one array share one root mean square, as optax has it.

    Attributes:
        lr: relative: each parameter moves by lr × its own root mean square (at least 1e-3).
        weight_decay: decoupled, lr × weight_decay × w, as AdamW's is.
        decay_rate: the second moment after t steps decays by 1 - t^-decay_rate.
        clip_update: an update whose root mean square is larger is scaled down to it.
    """

    kind: Literal["adafactor"] = "adafactor"
    lr: Positive = 1e-2
    weight_decay: NonNegative = 0.0
    decay_rate: OpenFraction = 0.8
    clip_update: Positive = 1.0
    clip_norm: Positive | None = None
    ema: OpenFraction | None = None
    # It has no hash of its own, and all else of an optimizer is hashed.
    groups: Groups = field(default_factory=dict, hash=False)

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """Return the transformation of gradients into updates, for a learning rate by steps."""
        import optax

        from runner.optim.parameter_groups import decay_mask

        # From its parts: optax.adafactor does not multiply the weight decay by the learning rate.
        return optax.chain(
            _clip_gradients(self.clip_norm),
            optax.scale_by_factored_rms(decay_rate=self.decay_rate),
            optax.clip_by_block_rms(self.clip_update),
            optax.scale_by_param_block_rms(),
            optax.add_decayed_weights(self.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(schedule),
        )


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon (Jordan et al. 2024): hidden matrices get their momentum orthogonalized, layer by layer; the rest AdamW.

    Scaled as in Liu et al. 2025 (arXiv:2502.16982), so that one learning rate and one weight decay serve both. A kernel
    that holds several maps side by side (queries, keys and values) counts as one matrix.

    Attributes:
        momentum: of hidden matrices.
        update_rms: an update of a hidden matrix has the root mean square update_rms × lr, about that of AdamW.
        b1: as AdamW's, for the rest.
        b2: as AdamW's, for the rest.
    """

    kind: Literal["muon"] = "muon"
    lr: Positive = 4e-3
    weight_decay: NonNegative = 0.1
    momentum: Momentum = 0.95
    update_rms: Positive = 0.2
    b1: Momentum = 0.9
    b2: Momentum = 0.95
    clip_norm: Positive | None = 1.0
    ema: OpenFraction | None = None
    # It has no hash of its own, and all else of an optimizer is hashed.
    groups: Groups = field(default_factory=dict, hash=False)

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """Return the transformation of gradients into updates, for a learning rate by steps."""
        import jax
        import optax
        from optax import contrib

        from runner.optim.parameter_groups import ParamsLike, count_fans, decay_mask, muon_axes

        def label_parameters(params: Params) -> ParamsLike:
            return jax.tree.map(lambda _, axes: "adam" if axes is None else "muon", params, muon_axes(params))

        def find_dimensions(params: Params) -> ParamsLike:
            return jax.tree.map(lambda _, axes: contrib.MuonDimensionNumbers(*axes), params, muon_axes(params))

        # An orthogonal matrix has a root mean square of 1/√(its longer side); this undoes it, whatever the shape.
        def scale_to_rms(updates: Params, params: Params | None) -> Params:
            return jax.tree.map(
                lambda update, axes: self.update_rms * max(count_fans(update, axes)) ** 0.5 * update,
                updates,
                muon_axes(updates),
            )

        orthogonal = contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=find_dimensions)
        orthogonal = optax.chain(orthogonal, optax.stateless(scale_to_rms))
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2)
        # Decay and learning rate come after both, so that they are the same for every parameter.
        return optax.chain(
            _clip_gradients(self.clip_norm),
            optax.partition({"muon": orthogonal, "adam": adam}, label_parameters),
            optax.add_decayed_weights(self.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(schedule),
        )


@dataclass(frozen=True, kw_only=True)
class ExternalOptim:
    """An optimizer of your own, or one of a library such as optax.

    The target is called as

        target(schedule, **options) -> optax.GradientTransformation

    `schedule` is a function from completed steps to the learning rate: what optax takes as `learning_rate`. A target
    that asks for none is called with its options alone; an optax.GradientTransformation is taken as it is. Such a one
    has no use for `lr` and `schedule`, which is told. Where its update takes `value` (the mean loss), `grad` or
    `value_fn` (the loss of other parameters on the same batch), it gets them. Gradients are not clipped, and what
    decays is the target's to say.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`, as in `optax:adamw`.
        options: what it is called with by name, as in `+optim.options.b1=0.8`.
        lr: what the schedule makes a learning rate for each step of.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: Positive = 1e-3
    ema: OpenFraction | None = None

    def build(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """Return what the target makes for a learning rate by steps; raises ConfigError where it is none."""
        from runner.optim.user_optimizer import make_user_transformation

        return make_user_transformation(self.target, self.options, schedule)


def _clip_gradients(norm: float | None) -> optax.GradientTransformation:
    import optax

    from runner.optim.clip import clip_by_known_norm

    return optax.identity() if norm is None else clip_by_known_norm(norm)


Optim = AdamW | Lion | Sgd | Adafactor | Muon | ExternalOptim
