"""Models as other people write them: what their call asks for is told, what they are made of lasts, or a line says why.

Nothing here was written for this runner: the classes are small copies of how published models differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import InvalidModelOrObjective
from models.call_roles import follow_mode, read_roles
from models.objectives import BatchObjective, make_objective
from models.user_arguments import Wanted, bind_arguments
from models.user_model import build_user_model
from runner.errors import ConfigError
from runner.optim.optimizers import Sgd
from runner.train.build import build
from runner.train.dataset import read_sources
from runner.train.rehearse import rehearse
from runner.train.split_model import SplitModel, merge_model, split_model, split_variables
from runner.train.step import init_state, make_eval_step, make_train_step
from runner.types import Batch, State
from tests.conftest import composed

BATCH, FEATURES, CLASSES = 16, 6, 4
KEY = jax.random.key(3)


class Body(nnx.Module):
    """A linear map with a BatchNorm and a Dropout, which are told in the call whether they train."""

    def __init__(self, rngs: nnx.Rngs):
        self.map = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
        self.norm = nnx.BatchNorm(CLASSES, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def run(self, x: jax.Array, training: bool, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = self.norm(self.map(x), use_running_average=not training)
        return self.drop(x, deterministic=not training, rngs=rngs)


class ByTraining(Body):
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        return self.run(x, training)


class ByTrain(Body):
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.run(x, train)


class ByIsTraining(Body):
    def __call__(self, x: jax.Array, is_training: bool = False) -> jax.Array:
        return self.run(x, is_training)


class ByDeterministic(Body):
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        return self.run(x, not deterministic)


class ByRunningAverage(Body):
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        return self.run(x, not use_running_average)


class ByRngs(Body):
    def __call__(self, x: jax.Array, rngs: nnx.Rngs, train: bool = False) -> jax.Array:
        return self.run(x, train, rngs)


class ByKey(Body):
    def __call__(self, x: jax.Array, *, key: jax.Array, train: bool = False) -> jax.Array:
        x = self.norm(self.map(x), use_running_average=not train)
        return x * jax.random.bernoulli(key, 0.5, x.shape) * 2 if train else x


class ByNothing(Body):
    """flax's own way: the layers follow `model.train()`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.map(x)))


class WithoutStreams(Body):
    """A Dropout that was made without random numbers, as one published model has it."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        return self.run(x, training)


TOLD = [ByTraining, ByTrain, ByIsTraining, ByDeterministic, ByRunningAverage, ByRngs, ByKey, WithoutStreams]


def batch() -> Batch:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((BATCH, FEATURES)).astype(np.float32) + 1
    return {"inputs": jnp.asarray(inputs), "label": jnp.asarray(rng.integers(0, CLASSES, BATCH), jnp.int32)}


def taken_apart(make: Callable[[nnx.Rngs], nnx.Module]) -> SplitModel:
    def made() -> nnx.Module:
        model = make(nnx.Rngs(KEY))
        follow_mode(model, KEY)
        return model

    return split_model(made, lambda model: None)


def fresh(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[SplitModel, State]:
    network, tx = taken_apart(make), Sgd(lr=0.1).build(lambda step: 0.1)
    model = make(nnx.Rngs(KEY))
    follow_mode(model, KEY)
    return network, init_state(split_variables(model), tx)


def stepped(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[SplitModel, State, State]:
    """Return the model, its state, and the state after one step."""
    network, state = fresh(make)

    def make_optimizer(lr: Any) -> Any:
        return Sgd(lr=0.1).build(lambda step: 0.1), lambda step: 0.1

    step = make_train_step(network, make_objective("classify", CLASSES), make_optimizer)
    return network, state, jax.jit(step)(state, batch(), jnp.float32(0.1))[0]


@pytest.mark.parametrize("make", [*TOLD, ByNothing])
def test_every_way_of_being_told_trains_in_training(make: type[Body]) -> None:
    """BatchNorm moved as its formula says, and random numbers were drawn; the class and its parameters are unchanged."""
    _, before, after = stepped(make)
    mapped = make(nnx.Rngs(KEY)).map(batch()["inputs"])
    np.testing.assert_allclose(after["extra"]["norm"]["mean"], 0.01 * mapped.mean(axis=0), rtol=1e-5)
    drawn = jax.tree.map(lambda old, new: bool((old != new).any()), before["rng"], after["rng"])
    assert any(jax.tree.leaves(drawn))
    assert before["params"].keys() == {"map", "norm"}


@pytest.mark.parametrize("make", [*TOLD, ByNothing])
def test_every_way_of_being_told_evaluates_in_evaluation(make: type[Body]) -> None:
    network, _, after = stepped(make)
    sums = make_eval_step(network, make_objective("classify", CLASSES))(after, batch(), jnp.ones(BATCH))
    model = merge_model(network.eval, network, after)
    assert isinstance(model, make)
    by_hand = model.norm(model.map(batch()["inputs"]), use_running_average=True)
    losses = -jax.nn.log_softmax(by_hand)[jnp.arange(BATCH), batch()["label"]]
    np.testing.assert_allclose(sums["loss"], losses.sum(), rtol=1e-5)


def test_what_a_caller_says_wins() -> None:
    model = ByTraining(nnx.Rngs(KEY))
    follow_mode(model, KEY)
    model.train()
    x = batch()["inputs"]
    assert (model(x) == 0).any()
    assert not (model(x, training=False) == 0).any()
    assert not (model(x, False) == 0).any()


def test_roles_are_read_from_names_and_types() -> None:
    def call(
        self: Any, x: Any, mask: Any = None, *, rng: Any, rngs: nnx.Rngs, dropout_key: "jax.Array", train: Any
    ) -> Any: ...

    roles = read_roles(call, skip=2)
    assert (roles.training, roles.rngs, roles.keys) == (("train",), ("rngs",), ("rng", "dropout_key"))

    # One published model takes a key under the name that others give to streams.
    def keyed(self: Any, x: Any, *, rngs: jax.Array) -> Any: ...

    assert read_roles(keyed, skip=2).keys == ("rngs",)


def test_a_bridge_to_linen_is_refused_only_where_its_mode_would_be_lost() -> None:
    from flax import linen

    class Told(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            return linen.Dropout(0.5, deterministic=not train)(linen.Dense(CLASSES)(x))

    def bridge(module: Any) -> nnx.Module:
        return nnx.bridge.ToNNX(module, rngs=nnx.Rngs(KEY)).lazy_init(jnp.ones((1, FEATURES)))

    with pytest.raises(InvalidModelOrObjective, match=r"Told is told in its call whether it trains \(train\)"):
        follow_mode(bridge(Told()), KEY)
    _, before, after = stepped(lambda rngs: bridge(linen.Dense(CLASSES)))
    assert (before["params"]["kernel"] != after["params"]["kernel"]).all()


def test_a_mode_that_nobody_can_set_is_refused() -> None:
    class Fixed(ByTraining):
        @property
        def deterministic(self) -> bool:
            return True

    with pytest.raises(InvalidModelOrObjective, match="Fixed has a property `deterministic`, which nobody can set"):
        follow_mode(Fixed(nnx.Rngs(KEY)), KEY)


def test_a_model_that_asks_for_nothing_is_left_alone() -> None:
    model = ByNothing(nnx.Rngs(KEY))
    follow_mode(model, KEY)
    assert type(model) is ByNothing
    assert not hasattr(model, "call_rngs")


# --- what a model is made of ---


class Buffers(nnx.Module):
    """Plain arrays as attributes, and a parameter of whole numbers."""

    def __init__(self, rngs: nnx.Rngs):
        self.map = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
        self.scale = jnp.arange(1.0, CLASSES + 1)
        self.offset = np.ones(CLASSES, np.float32)
        self.order = nnx.Param(jnp.arange(CLASSES))

    def __call__(self, x: jax.Array) -> jax.Array:
        return (self.map(x) * self.scale + self.offset)[:, self.order.get_value()]


class Scalars(nnx.Module):
    """Parameters that are a number of Python's, or a tree of arrays."""

    def __init__(self, rngs: nnx.Rngs):
        self.map = nnx.Linear(FEATURES, CLASSES, rngs=rngs)
        self.scale = nnx.Param(1.0)
        self.both = nnx.Param({"shift": jnp.zeros(CLASSES), "gain": jnp.ones(CLASSES)})

    def __call__(self, x: jax.Array) -> jax.Array:
        both = self.both.get_value()
        return self.map(x) * self.scale.get_value() * both["gain"] + both["shift"]


class Counting(Buffers):
    """A plain array that every call sets anew."""

    def __call__(self, x: jax.Array) -> jax.Array:
        self.scale = self.scale + 1.0
        return super().__call__(x)


class ReadsValues(nnx.Module):
    """A constructor that looks at numbers: stochastic depth, as most ports have it."""

    def __init__(self, rngs: nnx.Rngs):
        self.drops = nnx.List([nnx.Dropout(float(rate), rngs=rngs) for rate in jnp.linspace(0.0, 0.4, 3)])
        self.map = nnx.Linear(FEATURES, int(jnp.sqrt(16.0)), rngs=rngs)
        self.norm = np.asarray(self.map.kernel.get_value()).std().item()

    def __call__(self, x: jax.Array) -> jax.Array:
        for drop in self.drops:
            x = drop(x)
        return self.map(x) / self.norm


class Partitioned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("rows", None))
        with nnx.use_eager_sharding(False):
            self.map = nnx.Linear(FEATURES, CLASSES, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.map(x)


def test_plain_arrays_last_and_are_not_trained() -> None:
    network, before, after = stepped(Buffers)
    assert network.is_traceable
    assert before["params"].keys() == {"map"}
    for name in ("scale", "offset", "order"):
        np.testing.assert_array_equal(before["extra"][name], after["extra"][name])
    assert after["extra"]["order"].dtype == jnp.int32
    assert (before["params"]["map"]["kernel"] != after["params"]["map"]["kernel"]).all()


def test_a_parameter_may_be_a_number_or_a_tree() -> None:
    _, before, after = stepped(Scalars)
    assert before["params"].keys() == {"map", "scale", "both"}
    assert float(after["params"]["scale"]) != 1.0
    assert (np.asarray(after["params"]["both"]["shift"]) != 0).all()


def test_a_plain_array_that_a_call_sets_is_kept() -> None:
    _, before, after = stepped(Counting)
    np.testing.assert_array_equal(after["extra"]["scale"], before["extra"]["scale"] + 1)


def test_a_constructor_that_reads_values_runs_as_it_is_written() -> None:
    network, before, after = stepped(ReadsValues)
    assert not network.is_traceable
    _, again = fresh(ReadsValues)
    assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), before["params"], again["params"]))
    live = merge_model(network.train, network, after)
    assert [drop.rate for drop in live.drops] == [0.0, pytest.approx(0.2), pytest.approx(0.4)]
    assert isinstance(live.norm, float)


def test_a_kernel_that_says_where_it_lies_trains() -> None:
    _, before, after = stepped(Partitioned)
    assert (before["params"]["map"]["kernel"] != after["params"]["map"]["kernel"]).all()


# --- what a model gives ---


class Gives(Body):
    """A model whose call gives its logits in some other way than alone."""

    pack: Callable[[jax.Array], Any] = staticmethod(lambda logits: logits)

    def __call__(self, x: jax.Array) -> Any:
        return type(self).pack(self.map(x))


@dataclasses.dataclass
class Output:
    logits: jax.Array
    hidden: jax.Array


jax.tree_util.register_dataclass(Output, ["logits", "hidden"], [])


def giving(pack: Callable[[jax.Array], Any]) -> type[Gives]:
    return type("Packed", (Gives,), {"pack": staticmethod(pack)})


@pytest.mark.parametrize(
    "pack",
    [
        lambda logits: {"logits": logits, "hidden": logits},
        lambda logits: {"out": logits, "cache": None},
        lambda logits: (logits, {"state": jnp.zeros((2, 3, 4))}),
        lambda logits: Output(logits, logits),
        lambda logits: [logits],
    ],
)
def test_logits_are_found_in_what_a_model_gives(pack: Callable[[jax.Array], Any]) -> None:
    _, _, plain = stepped(giving(lambda logits: logits))
    _, _, packed = stepped(giving(pack))
    assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), plain["params"], packed["params"]))


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (
            lambda logits: (logits, logits),
            r"a tuple of an array of shape \(16, 4\).*several arrays that could be logits",
        ),
        (lambda logits: {"a": logits.mean()}, "a dict with a, with no logits"),
        (lambda logits: logits.mean(axis=0), r"an array of shape \(4,\); expected logits of shape \(16, 4\)"),
        (lambda logits: logits[:, :2], "gave 2 logits, but there are 4 classes"),
        (lambda logits: "logits", "gave str, with no logits"),
    ],
)
def test_what_cannot_be_logits_is_refused(pack: Callable[[jax.Array], Any], message: str) -> None:
    with pytest.raises(InvalidModelOrObjective, match=message) as raised:
        rehearsed(giving(pack))
    assert "\n" not in str(raised.value)


def rehearsed(make: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    shapes = jax.eval_shape(batch)
    return rehearse(taken_apart(make), make_objective("classify", CLASSES), shapes, "nets:Net")


class InferenceOnly(Body):
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.run(x, training=False)


class HalfFrozen(Body):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.frozen = nnx.BatchNorm(FEATURES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.map(self.frozen(x, use_running_average=True))))


class Remembers(ByNothing):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.last = nnx.Variable(x.mean())
        return super().__call__(x)


class Forgets(Buffers):
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        del self.order
        return y


class NothingToTrain(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.weights = jnp.ones((FEATURES, CLASSES))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weights


class TwoInputs(Body):
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return self.map(x) * mask


class AsksForMore(Body):
    """What it is told is not all that its call asks for."""

    def __call__(self, x: jax.Array, return_features: bool, train: bool) -> jax.Array:
        return self.run(x, train)


class MakesLayers(Body):
    """A layer that is made when it is first needed."""

    def __call__(self, x: jax.Array) -> jax.Array:
        if not hasattr(self, "late"):
            self.late = nnx.Linear(CLASSES, CLASSES, rngs=nnx.Rngs(0))
        return self.late(self.map(x))


class Grows(Body):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.seen = nnx.Variable(jnp.zeros(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen.set_value(jnp.append(self.seen.get_value(), x.mean()))
        return self.map(x)


class ChangesType(Body):
    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.count = nnx.Variable(jnp.int32(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count.set_value(self.count.get_value() + 0.5)
        return self.map(x)


@pytest.mark.parametrize("make", [*TOLD, ByNothing, Buffers, ReadsValues])
def test_a_model_that_trains_is_not_warned_of(make: type[nnx.Module]) -> None:
    found = rehearsed(make)
    assert found.warnings == ()
    assert found.metrics == ("loss", "accuracy")


def test_layers_that_never_train_are_named() -> None:
    norm, drop = rehearsed(InferenceOnly).warnings
    assert norm.startswith("nets:Net: 1 of 1 BatchNorm layers never see training mode, so none of them moves its")
    assert drop.startswith(
        "nets:Net: 1 of 1 Dropout layers never see training mode, so none of them drops anything (drop)"
    )
    (frozen,) = rehearsed(HalfFrozen).warnings
    assert frozen.startswith("nets:Net: 1 of 2 BatchNorm layers never see training mode")
    assert "(frozen)" in frozen


class SetsParameters(ByNothing):
    """A codebook that its call moves, as vector quantization by moving averages does."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.book = nnx.Param(jnp.ones(FEATURES))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.book.set_value(0.9 * self.book.get_value() + 0.1 * x.mean(axis=0))
        return super().__call__(x)


def test_a_parameter_that_a_call_sets_is_told_of() -> None:
    (said,) = rehearsed(SetsParameters).warnings
    assert "its call sets parameters (book), which the optimizer alone does here" in said


def test_a_variable_that_a_call_makes_is_told_of() -> None:
    (said,) = rehearsed(Remembers).warnings
    assert "variables that last for that call alone (last)" in said
    _, _, after = stepped(Remembers)
    assert "last" not in after["extra"]


class RemembersInTraining(Body):
    """Makes a variable in training alone; and is evaluated without it."""

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if train:
            self.seen = nnx.Variable(x.mean())
        return self.run(x, train)


def test_what_training_alone_does_is_told_of() -> None:
    (said,) = rehearsed(RemembersInTraining).warnings
    assert "variables that last for that call alone (seen)" in said


def test_an_objective_of_ones_own_calls_a_model_as_it_likes() -> None:
    def loss(model: Any, given: Batch, weights: jax.Array) -> dict[str, jax.Array]:
        return {"loss": model(given["inputs"], given["label"][:, None]).mean(axis=1)}

    shapes = jax.eval_shape(batch)
    found = rehearse(taken_apart(TwoInputs), BatchObjective(loss, calls_with_inputs=False), shapes, "nets:Net")
    assert found.metrics == ("loss",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (NothingToTrain, "model.target: nets:Net: has nothing to train: no nnx.Param of floating-point numbers"),
        (
            TwoInputs,
            "model.target: nets:Net: cannot be called with its inputs alone: missing a required argument: 'mask'",
        ),
        (Forgets, "model.target: nets:Net: its call removes the variable 'order'"),
        (
            AsksForMore,
            "model.target: nets:Net: cannot be called with its inputs alone: missing a required argument: 'return_f",
        ),
        (MakesLayers, "model.target: nets:Net: its call makes parameters (late.bias, late.kernel): new ones in every"),
        (Grows, "model.target: nets:Net: its call changes the variable 'seen' from float32[1] to float32[2]"),
        (ChangesType, "model.target: nets:Net: its call changes the variable 'count' from int32[] to float32[]"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(make: type[nnx.Module], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        rehearsed(make)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


class Exchanged(nnx.Module):
    """Logits with examples and classes exchanged."""

    takes = ("features",)

    def __init__(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs):
        self.map = nnx.Linear(inputs[0], num_outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.map(x).T


MADE_ON_IMPORT = ByNothing(nnx.Rngs(0))


def few_examples() -> dict[str, Any]:
    return {"inputs": np.ones((40, 3), np.float32), "label": np.arange(40) % 4}


@pytest.mark.parametrize("size", [4, 8])
def test_logits_with_classes_first_are_refused_whatever_the_batch_is(size: int) -> None:
    """With as many examples in a batch as classes the shape is right, and only the numbers are wrong."""
    own = "tests.models.test_foreign_models"
    words = ["model=external", f"model.target={own}:Exchanged", "data=external", f"data.target={own}:few_examples"]
    config = composed(*words, f"data.batch_size={size}")
    with pytest.raises(ConfigError, match="the model gave an array of shape"):
        build(config, read_sources(config.data))


def test_a_model_that_is_made_already_is_none_to_make() -> None:
    with pytest.raises(InvalidModelOrObjective, match="is a ByNothing that was made on import; name its class"):
        build_user_model(f"{__name__}:MADE_ON_IMPORT", {}, (FEATURES,), CLASSES, nnx.Rngs(0))


# --- what a model is made with ---


@dataclasses.dataclass(frozen=True)
class Layers:
    depth: int = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int
    num_labels: int = 1000
    layers: Layers = Layers()
    patch: tuple[int, ...] = ()

    @classmethod
    def tiny(cls) -> Settings:
        return cls(width=3, num_labels=7)

    @classmethod
    def sized(cls, num_classes: int = 1000, *, width: int = 6) -> Settings:
        return cls(width=width, num_labels=num_classes)


def by_position(inputs: Any, num_outputs: Any, rngs: Any, width: int = 1) -> None: ...
def by_other_names(shape: Any, n: Any, *, rngs: Any) -> None: ...
def by_name(*, in_features: int, num_classes: int = 1000, width: int = 8, rngs: Any) -> None: ...
def swapped(num_classes: int, in_channels: int, rngs: Any) -> None: ...
def of_settings(cfg: Settings, *, rngs: Any) -> None: ...
def of_settings_and(cfg: Settings, mesh: Any = None, *, rngs: Any) -> None: ...
def of_numbers(width: int, depth: int, rngs: Any) -> None: ...
def of_rngs(rngs: Any) -> None: ...
def of_nothing() -> None: ...
def of_text(vocab_size: int, num_classes: int, rngs: Any) -> None: ...
def anything(*args: Any, **kwargs: Any) -> None: ...


IMAGE, RNGS = (8, 8, 3), object()


@pytest.mark.parametrize(
    ("target", "options", "positional", "named"),
    [
        (by_position, {}, [IMAGE, 10], {"rngs": RNGS}),
        (by_position, {"width": 4}, [IMAGE, 10], {"rngs": RNGS, "width": 4}),
        (by_other_names, {}, [IMAGE, 10], {"rngs": RNGS}),
        (anything, {"a": 1}, [IMAGE, 10], {"rngs": RNGS, "a": 1}),
        (by_name, {}, [], {"in_features": 3, "num_classes": 10, "rngs": RNGS}),
        (by_name, {"num_classes": 5}, [], {"in_features": 3, "num_classes": 5, "rngs": RNGS}),
        (swapped, {}, [], {"num_classes": 10, "in_channels": 3, "rngs": RNGS}),
        (of_rngs, {}, [], {"rngs": RNGS}),
        (of_nothing, {}, [], {}),
        (of_settings, {"cfg": {"width": 5}}, [], {"cfg": Settings(5, 10), "rngs": RNGS}),
        (of_settings, {"cfg": {"width": 5, "num_labels": 2}}, [], {"cfg": Settings(5, 2), "rngs": RNGS}),
        (
            of_settings,
            {"cfg": {"width": 5, "layers": {"depth": 9}}},
            [],
            {"cfg": Settings(5, 10, Layers(9)), "rngs": RNGS},
        ),
        (of_settings_and, {"cfg": {"width": 5}}, [], {"cfg": Settings(5, 10), "rngs": RNGS}),
        (of_settings, {"cfg": "tiny"}, [], {"cfg": Settings(3, 7), "rngs": RNGS}),
        (of_settings, {"cfg": "sized"}, [], {"cfg": Settings(6, 10), "rngs": RNGS}),
        (
            of_settings,
            {"cfg": {"width": 1, "patch": [4, 4]}},
            [],
            {"cfg": Settings(1, 10, patch=(4, 4)), "rngs": RNGS},
        ),
    ],
)
def test_a_constructor_gets_what_its_names_say(target: Any, options: Any, positional: Any, named: Any) -> None:
    assert bind_arguments(target, options, Wanted(IMAGE, 10, RNGS)) == (positional, named)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (of_settings, {}, r"Settings asks for width; give it as \+model.options.cfg.width="),
        (of_settings, {"cfg": {"widht": 5}}, "model.options.cfg.widht: Settings has no such field; it has: width, num"),
        (of_settings_and, {}, "Settings asks for width"),
        (of_numbers, {}, r"it asks for width; give it as"),
        (of_text, {}, r"it asks for vocab_size; give it as \+model.options.vocab_size="),
        (lambda depth, *, rngs: None, {}, r"it asks for depth; give it as \+model.options.depth="),
    ],
)
def test_what_no_name_says_is_asked_for(target: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidModelOrObjective, match=message):
        bind_arguments(target, options, Wanted(IMAGE, 10, RNGS))
