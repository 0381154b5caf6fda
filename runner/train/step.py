"""The train state and its successor: pure functions, jitted once.

The state is a plain dict of arrays, donated to the step:

    {"step": Int[], "params": …, "extra": …, "rng": …, "opt": …, "ema": …, "frozen": …, "reference": …}

`params` are the trained variables; `frozen` those that `tune=` keeps from training, where there are any;
`reference` has `params` and `extra` as they were when training began, where an objective compares with that;
`extra` every other variable that lasts (batch statistics, a user's own);
`rng` the random streams of the model (dropout); `ema` an average of `params`, where one is kept. split_model.py takes
a model apart into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.objectives import CONSTANTS, BatchObjective, MergeableMetric
from runner.errors import ConfigError
from runner.train.frozen_layers import FrozenLayers, keep_unchanged, split_frozen
from runner.train.split_model import (
    SplitModel,
    Variables,
    abstract_variables,
    keep_structure,
    merge_model,
    split_variables,
)
from runner.types import Batch, Metrics, Params, State, Tree

# (params, state, batch) → (mean loss, (mean metrics, what the model changed beside its parameters))
MeanLoss: TypeAlias = Callable[[Params, State, Batch], tuple[jax.Array, tuple[Metrics, State]]]
# (params, state, batch) → ((mean loss, (mean metrics, changed)), gradients), as jax.value_and_grad returns them
Gradients: TypeAlias = Callable[[Params, State, Batch], tuple[tuple[jax.Array, tuple[Metrics, State]], Params]]
# learning rate → (transformation, the schedule that it follows, if any)
MakeOptimizer: TypeAlias = Callable[[jax.Array | float], tuple[optax.GradientTransformation, optax.Schedule | None]]
TrainStepFunction: TypeAlias = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
Precision: TypeAlias = Literal["fp32", "bf16"]
Weights: TypeAlias = Literal["params", "ema"]

# The key of a batch under which it says how much each example counts.
WEIGHT = "__weight__"


def make_key(seed: int) -> jax.Array:
    """Return the random key of a seed. Two seeds never share one: jax alone looks at the lower 32 bits only."""
    low, high = seed % 2**32, seed >> 32
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


def init_state(
    variables: Variables,
    tx: optax.GradientTransformation,
    *,
    ema: bool = False,
    frozen: FrozenLayers = MappingProxyType({}),
    reference: bool = False,
) -> State:
    """Return the state of a fresh model, given its variables and which of them do not train, at step 0.

    `ema` and `reference` say whether an average of the weights, and the weights as they are now, are kept beside them.
    """
    whole, rng, extra = variables
    # Without the split where all trains: a tree of the user's own keeps its order.
    params, still = split_frozen(whole, frozen) if frozen else (whole, {})
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "rng": rng,
        "extra": extra,
        "opt": tx.init(params),
        **({"frozen": still} if frozen else {}),
    }
    state = with_ema(state) if ema else state
    return with_reference(state) if reference else state


def with_ema(state: State) -> State:
    """Return the state with an average of the weights that begins as they are now."""
    return {**state, "ema": jax.tree.map(jnp.copy, state["params"])}


def with_reference(state: State) -> State:
    """Return the state with what the model is now, for an objective that compares with it."""
    return {**state, "reference": jax.tree.map(jnp.copy, {name: state[name] for name in ("params", "extra")})}


def make_init(
    make_model: Callable[[jax.Array], nnx.Module],
    network: SplitModel,
    begin: Callable[[Variables], State],
    shardings: Callable[[State], Tree],
) -> tuple[Callable[[jax.Array], State], State]:
    """Return a function (key → fresh state) whose arrays are born where they belong, and the abstract state.

    The key is an argument of the program: another seed finds it compiled. A restored state is laid out by the same
    abstract state, so that the first step after a resume finds the compiled program. A constructor that cannot be
    traced runs on the CPU, and its arrays are moved.
    """
    shapes = jax.eval_shape(begin, abstract_variables(network))
    where = shardings(shapes)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, where
    )

    def fresh(key: jax.Array) -> State:
        return begin(split_variables(make_model(key)))

    if network.is_traceable:
        return jax.jit(fresh, out_shardings=where), abstract

    def run_constructor(key: jax.Array) -> State:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            variables = jax.tree.map(jnp.asarray, split_variables(make_model(key)))
            return jax.device_put(begin(variables), where)

    return run_constructor, abstract


@dataclass(frozen=True)
class UpdateOptions:
    """How one update is computed: in which precision, in how many microbatches, with which EMA decay (None: no EMA)."""

    precision: Precision = "fp32"
    microbatches: int = 1
    ema: float | None = None


def make_mean_loss(model: SplitModel, objective: BatchObjective, precision: Precision) -> MeanLoss:
    """Return the function that is differentiated: (params, state, batch) → (loss, (metrics, changed)).

    Where the batch says how much each example counts (WEIGHT, as `weigh_examples` adds it), means are weighted.
    """

    def mean_loss(params: Params, state: State, batch: Batch) -> tuple[jax.Array, tuple[Metrics, State]]:
        params, batch = cast_floats(params, precision), cast_inputs(batch, precision)
        state = _with_cast_frozen({**state, "params": params}, precision)
        live = merge_model(model.train, model, state)
        examples, weights = {name: value for name, value in batch.items() if name != WEIGHT}, batch.get(WEIGHT)
        weight = jnp.ones(_count_examples(batch), jnp.float32)
        found = objective(live, examples, weight, make_reference(model, objective, state, precision))
        means = {name: _mean(value, weights) for name, value in found.items()}
        _, rng, extra = split_variables(live)
        changed = {"rng": keep_structure(rng, state["rng"]), "extra": keep_structure(extra, state["extra"])}
        return means["loss"], (means, cast_like(changed, state))

    return mean_loss


def make_reference(
    model: SplitModel, objective: BatchObjective, state: State, precision: Precision
) -> nnx.Module | None:
    """Return the model as it was when training began, in evaluation mode, for an objective that compares with it."""
    if not objective.compares:
        return None
    before = cast_floats(state["reference"]["params"], precision)
    return merge_model(model.eval, model, {**state, "params": before, "extra": state["reference"]["extra"]})


def _with_cast_frozen(state: State, precision: Precision) -> State:
    """Return the state with the parameters that do not train in the type that the others are computed in."""
    return {**state, "frozen": cast_floats(state["frozen"], precision)} if "frozen" in state else state


def _mean(value: Any, weights: jax.Array | None) -> jax.Array:
    """Return the mean of one value per example, or what a metric that is no mean makes of the batch."""
    if isinstance(value, MergeableMetric):
        return jnp.asarray(value.compute(), jnp.float32)
    if weights is None:
        return value.mean()
    # Chosen and not multiplied: an example that counts for nothing may be infinite.
    return jnp.where(weights > 0, value * weights, 0).mean()


def weigh_examples(batch: Batch, objective: BatchObjective) -> Batch:
    """Return the batch with how much each example counts, where the objective says so; the weights' mean is 1.

    They are relative to the whole batch: the parts it may be split into then count as much as they hold.
    """
    if objective.weigh is None:
        return batch
    weights = objective.weigh(batch)
    return {**batch, WEIGHT: weights / jnp.maximum(weights.mean(), 1e-30)}


def _count_examples(batch: Batch) -> int:
    return len(next(iter(take_constants(batch)[0].values())))


def make_train_step(
    model: SplitModel,
    objective: BatchObjective,
    make_optimizer: MakeOptimizer,
    options: UpdateOptions = UpdateOptions(),
) -> TrainStepFunction:
    """Return one update: (state, batch, learning rate) → (next state, metrics).

    Metrics are means over the batch, and stay on the device. The peak learning rate is an argument, so that a sweep
    over it compiles once.
    """
    loss = make_mean_loss(model, objective, options.precision)
    gradients = accumulate_gradients(jax.value_and_grad(loss, has_aux=True), options.microbatches)
    value = make_value(loss, options.microbatches)

    def train_step(state: State, batch: Batch, lr: jax.Array) -> tuple[State, Metrics]:
        tx, schedule = make_optimizer(lr)
        batch = weigh_examples(batch, objective)
        (_, (means, changed)), grads = gradients(state["params"], state, batch)
        # jax gives the conjugate of the direction in which a complex parameter raises the loss.
        grads = jax.tree.map(lambda leaf: leaf.conj() if jnp.iscomplexobj(leaf) else leaf, grads)
        # Ours do without it; a line search, for one, asks for the loss of other parameters.
        value_fn = {"value_fn": partial(value, state, batch)}
        updated, metrics = apply_update(state, (grads, means, changed), (tx, schedule), options.ema, **value_fn)
        return keep_unchanged(state, updated), metrics

    return train_step


def apply_update(
    state: State,
    computed: tuple[Params, Metrics, State],
    optimizer: tuple[optax.GradientTransformation, optax.Schedule | None],
    ema: float | None,
    **extra: Any,
) -> tuple[State, Metrics]:
    """Return the next state, and the metrics with the norm of the gradient and the learning rate.

    Args:
        state: the state before.
        computed: gradients, mean metrics, and what the model changed beside its parameters.
        optimizer: the transformation, and the schedule; None where the transformation asks for none.
        ema: the decay of the average of the parameters; None where none is kept.
        extra: what an optimizer may ask for beside these.
    """
    (grads, means, changed), (tx, schedule) = computed, optimizer
    grad_norm = optax.tree.norm(grads)
    updates, opt = optax.with_extra_args_support(tx).update(
        grads, state["opt"], state["params"], value=means["loss"], grad=grads, grad_norm=grad_norm, **extra
    )
    params = optax.apply_updates(state["params"], updates)
    metrics = {**means, "grad_norm": grad_norm}
    if schedule is not None:
        metrics["lr"] = jnp.asarray(schedule(state["step"]))
    average = {} if ema is None else {"ema": update_ema(state["ema"], params, ema, state["step"])}
    return {"step": state["step"] + 1, "params": params, "opt": opt, **changed, **average}, metrics


@dataclass(frozen=True)
class TrainStep:
    """The jitted train step of one run with its learning rate; not compiled yet."""

    jitted: jax.stages.Wrapped  # (state, batch, lr) → (next state, metrics)
    lr: float
    lr_sharding: jax.sharding.Sharding

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """Do one update."""
        return self.jitted(state, batch, np.float32(self.lr))

    def trace(self, state: State, batch: Batch) -> jax.stages.Traced:
        """Trace the step for these shapes."""
        return self.jitted.trace(state, batch, jax.ShapeDtypeStruct((), jnp.float32, sharding=self.lr_sharding))

    def compile(self, traced: jax.stages.Traced, state: State, batch: Batch) -> jax.stages.Compiled:
        """Compile what was traced of the step."""
        return traced.lower().compile()

    def put_lr(self) -> jax.Array:
        """Return the learning rate on the device: once for all steps, so that no step sends it again."""
        # `device_put` onto devices of other processes would first compare the value with theirs.
        return jax.make_array_from_callback((), self.lr_sharding, lambda _: np.asarray(self.lr, np.float32))

    def with_lr(self, program: jax.stages.Compiled) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """Return a compiled program of this step as a function of state and batch alone."""
        lr = self.put_lr()
        return lambda state, batch: program(state, batch, lr)


def accumulate_gradients(gradients: Gradients, num_parts: int) -> Gradients:
    """Compute a mean loss, its metrics and gradients in microbatches one after the other: memory for one at a time.

    Sums are kept in float32. Random streams and batch statistics pass from part to part: with dropout or BatchNorm the
    result is that of smaller batches, without them it is the whole batch's to rounding. One part is `gradients` itself.
    """
    if num_parts == 1:
        return gradients

    def accumulated(
        params: Params, state: State, batch: Batch
    ) -> tuple[tuple[jax.Array, tuple[Metrics, State]], Params]:
        def add_part(carry: tuple[State, Params], part: Batch) -> tuple[tuple[State, Params], Metrics]:
            changed, total = carry
            (_, (means, changed)), grads = gradients(params, {**state, **changed}, {**part, **constants})
            total = jax.tree.map(lambda sum, grad: sum + grad.astype(sum.dtype), total, grads)
            return (changed, total), means

        batch, constants = take_constants(batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), params)
        begin = ({name: state[name] for name in ("rng", "extra")}, zeros)
        (changed, total), means = jax.lax.scan(add_part, begin, split_microbatches(batch, num_parts))
        means = {name: values.mean(axis=0) for name, values in means.items()}
        grads = jax.tree.map(lambda sum, leaf: (sum / num_parts).astype(leaf.dtype), total, params)
        return (means["loss"], (means, changed)), grads

    return accumulated


def make_value(loss: MeanLoss, num_parts: int) -> Callable[[State, Batch, Params], jax.Array]:
    """Return the mean loss alone: (state, batch, parameters) → Float[], what an optimizer's `value_fn` gives.

    In microbatches it is computed as their gradients are, one part after the other, with the same random numbers. Where
    it is differentiated, each part is computed again for that, so that there is memory for one at a time as well.
    """

    def value(state: State, batch: Batch, params: Params) -> jax.Array:
        if num_parts == 1:
            return loss(params, state, batch)[0]

        batch, constants = take_constants(batch)

        @jax.checkpoint
        def add_part(changed: State, part: Batch) -> tuple[State, jax.Array]:
            mean, (_, changed) = loss(params, {**state, **changed}, {**part, **constants})
            return changed, mean

        begin = {name: state[name] for name in ("rng", "extra")}
        return jax.lax.scan(add_part, begin, split_microbatches(batch, num_parts))[1].mean(axis=0)

    return value


def take_constants(batch: Batch) -> tuple[Batch, Batch]:
    """Return the examples of a batch, and what it brings beside them that is the same for every part."""
    examples = {name: value for name, value in batch.items() if name != CONSTANTS}
    return examples, {name: value for name, value in batch.items() if name == CONSTANTS}


def split_microbatches(batch: Batch, num_parts: int) -> Batch:
    """Split [batch …] into [parts batch/parts …]: part i holds the examples i, i + parts, and so on.

    So each device of a mesh has its share of every part already; with consecutive examples, most would have to move.
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, num_parts, *leaf.shape[1:]).swapaxes(0, 1), batch)


def update_ema(ema: Params, params: Params, decay: float, step: jax.Array) -> Params:
    """Return the mean of the parameters after every update so far, each weighted by decay^age.

    The weights add up to one from the first update on, so the fresh parameters never count and nothing is left to
    correct: while there are few updates this is their plain mean, later an exponential moving average
    (Polyak & Juditsky 1992).
    """
    new = (1.0 - decay) / -jnp.expm1((step + 1) * math.log(decay))  # 1 - decay^(step + 1), without cancellation
    return jax.tree.map(lambda old, now: old + (new * (now - old)).astype(old.dtype), ema, params)


def with_weights(state: State, weights: Weights) -> State:
    """Return the state with these weights in the place of the parameters, for an evaluation or an export.

    Batch statistics stay those of the live model. Raises ConfigError where no average is kept.
    """
    if weights == "params":
        return state
    if "ema" not in state:
        raise ConfigError("weights=ema: this run keeps no average of its weights; one is kept with optim.ema=0.999")
    return {**state, "params": state["ema"]}


def make_eval_step(
    model: SplitModel, objective: BatchObjective, precision: Precision = "fp32"
) -> Callable[[State, Batch, jax.Array], Metrics]:
    """Return the evaluation step: (state, batch, weights) → metrics.

    They are weighted sums of every metric over the batch, and `weight`, the sum of the weights. A metric that is no
    mean comes as it is, to be merged with those of other batches.
    """

    def eval_step(state: State, batch: Batch, weights: jax.Array) -> Metrics:
        state = _with_cast_frozen({**state, "params": cast_floats(state["params"], precision)}, precision)
        reference = make_reference(model, objective, state, precision)
        examples = objective(merge_model(model.eval, model, state), cast_inputs(batch, precision), weights, reference)
        if objective.weigh is not None:
            weights = weights * objective.weigh(batch)
        sums = {name: sum_weighted(value, weights) for name, value in examples.items()}
        return {**sums, "weight": weights.sum()}

    return eval_step


def sum_weighted(value: Any, weights: jax.Array) -> Any:
    """Return the weighted sum of one value per example; a metric that knows how it is merged comes as it is."""
    if isinstance(value, MergeableMetric):
        return value
    # What fills up a batch may be infinite, and infinity times zero is NaN.
    return jnp.where(weights > 0, value * weights, 0).sum()


def cast_floats(tree: Tree, precision: Precision) -> Tree:
    """Cast floating-point arrays to what the model computes with. Gradients come back in the original type.

    A layer of flax computes in the type of what comes in. But its BatchNorm gives float32, like its statistics, and so
    does all that follows: cast its result back, as models/resnet.py does.
    """
    if precision == "fp32":
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if _is_float(leaf) else leaf, tree)


def cast_inputs(batch: Batch, precision: Precision) -> Batch:
    """Cast what a model computes with, `inputs`; never labels or anything else an objective measures against."""
    return {name: cast_floats(value, precision) if name == "inputs" else value for name, value in batch.items()}


def cast_like(changed: State, state: State) -> State:
    """Cast what the model changed beside its parameters to the types of the state: statistics stay float32."""
    return {name: jax.tree.map(lambda new, old: new.astype(old.dtype), changed[name], state[name]) for name in changed}


def is_finite(state: State) -> jax.Array:
    """Return Bool[]: every parameter and every average is finite, and what lasts beside them holds no NaN.

    Beside them infinity may be meant (a mask).
    """
    weights = _inexact_leaves([state.get(name, {}) for name in ("params", "ema")])
    # What a program of the user's own means by a number, nobody knows but the program.
    beside = _inexact_leaves([state.get(name, {}) for name in ("extra", "weights", "rest")])
    fine = [jnp.isfinite(leaf).all() for leaf in weights] + [~jnp.isnan(leaf).any() for leaf in beside]
    return jnp.stack(fine).all() if fine else jnp.ones((), bool)


def _inexact_leaves(tree: Tree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
