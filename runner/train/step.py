"""The train state and its successor: pure functions, jitted once. NNX is split and merged here and nowhere else.

The state is a plain dict of arrays, donated to the step: flattening NNX variables in Python costs 8-15 times a small
step, a dict almost nothing (measured on flax 0.12.8).

    {"step": Int[], "params": …, "extra": …, "rng": …, "opt": …, "ema": …}

`params` are the trained variables; `extra` every other variable that lasts (batch statistics, a user's own);
`rng` the random streams of the model (dropout); `ema` an average of `params`, where one is kept. Keys are strings, so
that any reader of a checkpoint sees one tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from runner.errors import ConfigError

Tree = dict[str, Any]
State = dict[str, Any]
Metrics = dict[str, jax.Array]
Objective = Callable[[nnx.Module, Mapping[str, jax.Array]], dict[str, jax.Array]]
MeanLoss = Callable[[Tree, State, Mapping[str, jax.Array]], tuple[jax.Array, Any]]
Gradients = Callable[[Tree, State, Mapping[str, jax.Array]], Any]  # → ((loss, (means, what moved)), gradients)
Optimizer = Callable[[Any], tuple[optax.GradientTransformation, optax.Schedule]]  # of a learning rate
Batch = Mapping[str, jax.Array]
Precision = Literal["fp32", "bf16"]
Weights = Literal["params", "ema"]


@dataclass(frozen=True)
class Network:
    """A model taken apart: its static structure for training and for evaluation, and the shape of its variables."""

    train: nnx.GraphDef
    eval: nnx.GraphDef
    variables: tuple[nnx.State, nnx.State, nnx.State]  # abstract: params, rng, extra


def take_apart(make_model: Callable[[], nnx.Module], prepare: Callable[[nnx.Module], None]) -> Network:
    """The structure of a model, without allocating anything; `prepare` may change what its modules are before."""
    model = nnx.eval_shape(make_model)
    prepare(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Embed) and module.dtype == module.param_dtype:
            module.dtype = None  # as in every other layer; flax would raise all that follows to float32
    model.train()
    graphdef, *variables = nnx.split(model, nnx.Param, nnx.RngState, ...)
    model.eval()
    return Network(graphdef, nnx.graphdef(model), (variables[0], variables[1], variables[2]))


def assemble(graphdef: nnx.GraphDef, network: Network, state: State) -> nnx.Module:
    """A live model from a state. Its variables are copies: changing them changes no state."""
    trees = (state["params"], state["rng"], state["extra"])
    filled = [_fill(variables, tree) for variables, tree in zip(network.variables, trees, strict=True)]
    return nnx.merge(graphdef, *filled, copy=True)


def init(make_model: Callable[[], nnx.Module], tx: optax.GradientTransformation, *, ema: bool = False) -> State:
    """The state of a fresh model at step 0."""
    _, *variables = nnx.split(make_model(), nnx.Param, nnx.RngState, ...)
    params, rng, extra = variables
    trees = {"params": _tree(params), "rng": _tree(rng), "extra": _tree(extra)}
    state = {"step": jnp.zeros((), jnp.int32), **trees, "opt": tx.init(trees["params"])}
    return averaging(state) if ema else state


def averaging(state: State) -> State:
    """The state with an average of the weights that begins as they are now."""
    return {**state, "ema": jax.tree.map(jnp.copy, state["params"])}


@dataclass(frozen=True)
class Update:
    """How one update is computed: in which precision, in how many parts, and whether an average is kept."""

    precision: Precision = "fp32"
    microbatches: int = 1
    ema: float | None = None


def mean_loss(network: Network, objective: Objective, precision: Precision) -> MeanLoss:
    """(params, state, batch) → (loss, (metrics, what moved beside the parameters)): means over the batch."""

    def mean_loss(params: Tree, state: State, batch: Batch) -> tuple[jax.Array, Any]:
        params, batch = cast(params, precision), cast(batch, precision)
        model = assemble(network.train, network, {**state, "params": params})
        means = {name: values.mean() for name, values in objective(model, batch).items()}
        _, *variables = nnx.split(model, nnx.Param, nnx.Intermediate, nnx.RngState, ...)
        _, _, rng, extra = variables
        return means["loss"], (means, like(state, {"rng": _tree(rng), "extra": _tree(extra)}))

    return mean_loss


def train_step(
    network: Network,
    objective: Objective,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    update: Update = Update(),
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """(state, batch) → (next state, metrics): one update. Metrics are means over the batch, and stay on the device."""
    loss = mean_loss(network, objective, update.precision)
    gradients = accumulated(jax.value_and_grad(loss, has_aux=True), update.microbatches)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        (_, (means, moved)), grads = gradients(state["params"], state, batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {**means, "grad_norm": optax.tree.norm(grads), "lr": jnp.asarray(schedule(state["step"]))}
        average = {} if update.ema is None else {"ema": averaged(state["ema"], params, update.ema, state["step"])}
        return {"step": state["step"] + 1, "params": params, "opt": opt, **moved, **average}, metrics

    return train_step


@dataclass(frozen=True)
class Rated:
    """A train step whose peak learning rate is an argument of its program, so that another rate finds it compiled."""

    jitted: jax.stages.Wrapped  # (state, batch, lr) → (next state, metrics)
    lr: float
    sharding: jax.sharding.Sharding

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        return self.jitted(state, batch, np.float32(self.lr))

    def trace(self, state: State, batch: Batch) -> jax.stages.Traced:
        return self.jitted.trace(state, batch, jax.ShapeDtypeStruct((), jnp.float32, sharding=self.sharding))

    def bound(self, program: jax.stages.Compiled) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """The compiled program at this rate, which lies on the device once for all steps."""
        lr = jax.device_put(np.float32(self.lr), self.sharding)
        return lambda state, batch: program(state, batch, lr)


def rated(
    network: Network, objective: Objective, optimizer: Optimizer, update: Update, lr: float, sharding: Any
) -> Rated:
    """The train step with what `optimizer` makes of a learning rate; not compiled yet."""

    def step(state: State, batch: Batch, lr: jax.Array) -> tuple[State, Metrics]:
        return train_step(network, objective, *optimizer(lr), update)(state, batch)

    step.__name__ = "train_step"  # of the program
    return Rated(jax.jit(step, donate_argnums=0), lr, sharding)


def accumulated(gradients: Gradients, parts: int) -> Gradients:
    """The same mean loss, metrics and gradients, computed in `parts` one after the other: memory for one at a time.

    Sums are kept in float32. Random streams and batch statistics pass from part to part: with dropout or BatchNorm the
    result is that of smaller batches, without them it is the same to rounding. One part is the function itself.
    """
    if parts == 1:
        return gradients

    def divided(params: Tree, state: State, batch: Batch) -> Any:
        def add(carry: tuple[State, Tree], part: Batch) -> tuple[tuple[State, Tree], Metrics]:
            moved, total = carry
            (_, (means, moved)), grads = gradients(params, {**state, **moved}, part)
            return (moved, jax.tree.map(lambda sum, grad: sum + grad.astype(sum.dtype), total, grads)), means

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), params)
        begin = ({name: state[name] for name in ("rng", "extra")}, zeros)
        (moved, total), means = jax.lax.scan(add, begin, interleaved(batch, parts))
        means = {name: values.mean(axis=0) for name, values in means.items()}
        grads = jax.tree.map(lambda sum, leaf: (sum / parts).astype(leaf.dtype), total, params)
        return (means["loss"], (means, moved)), grads

    return divided


def interleaved(batch: Batch, parts: int) -> Batch:
    """[batch …] → [parts batch/parts …]: part i holds the examples i, i + parts, …

    So each device of a mesh has its share of every part already; with consecutive examples, most would have to move.
    """
    return jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch)


def averaged(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """The mean of the parameters after every update so far, each weighted by decay^age (Polyak & Juditsky 1992).

    The weights add up to one from the first update on, so the fresh parameters never count and nothing is left to
    correct: while there are few updates this is their plain mean, later an exponential moving average.
    """
    new = (1.0 - decay) / -jnp.expm1((step + 1) * math.log(decay))  # 1 - decay^(step + 1), without cancellation
    return jax.tree.map(lambda old, now: old + (new * (now - old)).astype(old.dtype), ema, params)


def weighed(state: State, weights: Weights) -> State:
    """The state with these weights in the place of the parameters, for an evaluation or an export.

    Batch statistics stay those of the live model. Raises ConfigError where no average is kept.
    """
    if weights == "params":
        return state
    if "ema" not in state:
        raise ConfigError("weights=ema: this run keeps no average of its weights; one is kept with optim.ema=0.999")
    return {**state, "params": state["ema"]}


def eval_step(
    network: Network, objective: Objective, precision: Precision = "fp32"
) -> Callable[[State, Batch, jax.Array], Metrics]:
    """(state, batch, weights) → weighted sums of every metric over the batch, and the sum of the weights."""

    def eval_step(state: State, batch: Batch, weights: jax.Array) -> Metrics:
        state = {**state, "params": cast(state["params"], precision)}
        examples = objective(assemble(network.eval, network, state), cast(batch, precision))
        return {**{name: (values * weights).sum() for name, values in examples.items()}, "weight": weights.sum()}

    return eval_step


def cast(tree: Any, precision: Precision) -> Any:
    """Floating-point arrays as the model computes with them. Gradients come back through this in the original type.

    A layer of flax computes in the type of what comes in. But its BatchNorm gives float32, like its statistics, and so
    does all that follows: cast its result back, as models/resnet.py does.
    """
    if precision == "fp32":
        return tree
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if _is_float(leaf) else leaf, tree)


def like(state: State, moved: State) -> State:
    """What the model changed beside its parameters, in the types the state has: statistics stay float32."""
    return {name: jax.tree.map(lambda new, old: new.astype(old.dtype), moved[name], state[name]) for name in moved}


def is_finite(state: State) -> jax.Array:
    """Bool[]: whether every parameter and every average is finite, and what lasts beside them holds no NaN.

    Beside them infinity may be meant (a mask).
    """
    weights, beside = (_floats([state.get(name, {}) for name in names]) for names in (("params", "ema"), ("extra",)))
    fine = [jnp.isfinite(leaf).all() for leaf in weights] + [~jnp.isnan(leaf).any() for leaf in beside]
    return jnp.stack(fine).all()


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _tree(variables: nnx.State) -> Tree:
    """NNX variables as nested dicts of arrays with string keys."""
    return _string_keys(nnx.to_pure_dict(variables))


def _fill(variables: nnx.State, tree: Tree) -> nnx.State:
    """Variables of the given shape, holding the arrays of a tree."""
    filled = jax.tree.map(lambda leaf: leaf, variables)
    nnx.replace_by_pure_dict(filled, _keys_like(nnx.to_pure_dict(variables), tree))
    return filled


def _string_keys(node: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in node.items()} if isinstance(node, dict) else node


def _keys_like(template: Any, tree: Any) -> Any:
    if not isinstance(template, dict):
        return tree
    return {key: _keys_like(value, tree[str(key)]) for key, value in template.items()}


def place(
    make: Callable[[jax.Array], State], seed: int, sharding: jax.sharding.Sharding
) -> tuple[Callable[[], State], State]:
    """A jitted `make` of this seed whose result lies on `sharding`, and the abstract state with that sharding.

    The key is an argument of the program: another seed finds it compiled. A restored state is placed the same way, so
    that the first step after a resume finds the compiled program.
    """
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: make(jax.random.key(seed))),
    )
    placed = jax.jit(make, out_shardings=sharding)
    return lambda: placed(jax.random.key(seed)), abstract
