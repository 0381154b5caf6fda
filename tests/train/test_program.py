"""Programs of the user's own: what they are given and give, what of a state comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.checkpoint import store
from runner.config.schema import validate_config
from runner.errors import ConfigError, HoldfastError
from runner.launch.compose import compose_run
from runner.train.build import build, read_train_state
from runner.train.built import Built, LoadedProgram

HEAD = """
import functools
import jax
import jax.numpy as jnp
import numpy as np
import optax
from typing import Any, NamedTuple
"""
# A linear map by gradient descent: the smallest that is whole.
GOOD = """
class Program:
    def __init__(self, inputs, num_classes, lr=0.1):
        self.sizes, self.lr = (int(np.prod(inputs)), num_classes), lr
    def init(self, key, example):
        return {"params": {"w": 0.1 * jax.random.normal(key, self.sizes)}, "count": 0}
    def logits(self, params, batch):
        return batch["inputs"].reshape(len(batch["inputs"]), -1) @ params["w"]
    def losses(self, params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, batch), batch["label"])
    def step(self, state, batch, key):
        loss, grads = jax.value_and_grad(lambda params: self.losses(params, batch).mean())(state["params"])
        params = jax.tree.map(lambda p, g: p - self.lr * g, state["params"], grads)
        return {"params": params, "count": state["count"] + 1}, {"loss": loss}
    def evaluate(self, state, batch):
        right = self.logits(state["params"], batch).argmax(-1) == batch["label"]
        return {"loss": self.losses(state["params"], batch), "accuracy": right}
"""


def build_own(folder: Path, code: str, *words: str, data: str = "digits") -> Built:
    """Build a run of a program whose code is this, as the command line does."""
    file = folder / f"program{len(list(folder.iterdir()))}.py"
    file.write_text(HEAD + code)
    config = compose_run([f"program={file}:Program", f"data={data}", *words]).config
    return build(config)


def change(*pairs: tuple[str, str]) -> str:
    """Return the good program with some of its text replaced."""
    code = GOOD
    for old, new in pairs:
        assert old in code, old
        code = code.replace(old, new)
    return code


def first_batch(built: Built) -> dict[str, Any]:
    return dict(next(built.stream))


def test_it_is_called_with_keys_data_and_its_state(tmp_path: Path) -> None:
    built = build_own(tmp_path, GOOD, "program.options.lr=0.5")
    state = built.init()
    begin, _ = jax.random.split(jax.random.key(0))
    before = 0.1 * jax.random.normal(begin, (64, 10))
    np.testing.assert_allclose(state["weights"]["params"]["w"], before, rtol=1e-6)
    batch = first_batch(built)
    inputs, label = batch["inputs"].reshape(-1, 64), batch["label"]

    def loss(w: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(inputs @ w)
        return -log_p[np.arange(len(label)), label].mean()

    value, grad = jax.value_and_grad(loss)(before)
    new, metrics = built.train_step(state, built.put(batch))
    np.testing.assert_allclose(new["weights"]["params"]["w"], before - 0.5 * grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert (int(new["step"]), int(new["rest"]["count"])) == (1, 1)
    assert set(built.measures) == {"accuracy", "loss", "weight"}


def test_an_evaluation_averages_over_examples_and_leaves_padding_out(tmp_path: Path) -> None:
    built = build_own(tmp_path, GOOD, "data.batch_size=50")
    state, source = built.init(), built.sources.eval
    from runner.train.evaluator import EvaluationRun

    how = EvaluationRun(built.eval_step, tmp_path, "x")
    measured = built.evaluator(["eval"], state, how)["eval"]
    every = source.take(np.arange(len(source)))
    logits = every["inputs"].reshape(-1, 64) @ np.asarray(state["weights"]["params"]["w"])
    assert len(source) % 50
    assert measured["accuracy"] == pytest.approx((logits.argmax(-1) == every["label"]).mean())


STATES = """
class Pair(NamedTuple):
    first: Any
    second: Any

class Program:
    def init(self, key, example):
        if example is not None: assert example["inputs"].shape == (1, 8, 8, 1), example["inputs"].shape
        return Pair(
            {"key": key, "old_key": jax.random.PRNGKey(3), "mlp/~/linear_0": {"w": jnp.ones((2, 3), jnp.bfloat16)},
             "byte": jnp.int8(-3), "by_number": {7: jnp.int16(-300)}, "bool": True, "none": None, "empty": (), "scalar": 2.5, "int": 5,
             "uint": jnp.uint32(4000000000), "half": jnp.float16(0.1), "complex": jnp.complex64(1 + 2j),
             "inf": jnp.inf, "many": jax.random.split(key, 3)},
            [jnp.zeros((0, 4)), (optax.adam(1e-3).init({"w": jnp.ones(3)}),), np.arange(3)],
        )
    def step(self, state, batch, key):
        first = dict(state.first)
        first["key"] = jax.random.fold_in(first["key"], 1)
        first["scalar"] = first["scalar"] * jax.random.uniform(key)
        first["int"] = first["int"] + 1
        first["mlp/~/linear_0"] = jax.tree.map(lambda x: x * jnp.bfloat16(1.01), first["mlp/~/linear_0"])
        return state._replace(first=first), {"loss": first["scalar"], "int": first["int"], "flag": first["bool"]}
    def evaluate(self, state, batch):
        return {"loss": jnp.zeros(len(batch["label"]))}
"""


def test_any_pytree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Keys of both kinds, whole numbers, bfloat16, numbers of Python's, None and empty nodes, odd names."""
    built = build_own(tmp_path, STATES)
    state, _ = built.train_step(built.init(), built.put(first_batch(built)))
    assert not any(leaf.aval.weak_type for leaf in jax.tree.leaves(state))
    store.write_checkpoint(tmp_path / "5", state, {})
    back = read_train_state(built, tmp_path / "5")
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(back), strict=True):
        assert before.dtype == after.dtype, path
        words = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (before, after)]
        assert np.asarray(words[0]).tobytes() == np.asarray(words[1]).tobytes(), path
    own = built.model(back)
    assert isinstance(own, LoadedProgram)
    pair = own.state
    assert type(pair).__name__ == "Pair"
    assert pair.first["none"] is None
    assert pair.first["empty"] == ()
    assert pair.first["by_number"][7] == -300
    assert pair.first["mlp/~/linear_0"]["w"].dtype == jnp.bfloat16
    assert type(pair.second[1][0][0]).__name__ == "ScaleByAdamState"
    again, _ = built.train_step(back, built.put(first_batch(built)))
    # No part has a usual name, so all are what is learnt.
    assert int(again["weights"]["first"]["int"]) == 7


def test_weights_are_what_the_program_says_or_what_is_usually_called_so(tmp_path: Path) -> None:
    def sections(code: str) -> tuple[set[str], set[str]]:
        abstract = build_own(tmp_path, code).abstract
        return set(abstract["weights"]), set(abstract["rest"])

    assert sections(GOOD) == ({"params"}, {"count"})
    assert sections(change(("class Program:", "class Program:\n    weights = 'count'"))) == ({"count"}, {"params"})
    assert sections(change(('"params": ', '"table": '), ('["params"]', '["table"]'))) == ({"table", "count"}, set())


OWN_DATA = """
class Program:
    def init(self, key, example):
        assert example is None
        return {"params": jnp.zeros(3), "key": key}
    def step(self, state, batch, key):
        assert batch is None
        noise = jax.random.normal(key, (3,))
        return {**state, "params": state["params"] + noise}, {"loss": noise.sum()}
    def evaluate(self, state, batch):
        return {"loss": jnp.abs(state["params"]), "all": state["params"].sum()}
"""


def test_without_data_a_batch_is_none_and_a_skipped_batch_is_another_key(tmp_path: Path) -> None:
    built = build_own(tmp_path, OWN_DATA, data="none")
    state, numbers = built.init(), [next(built.stream) for _ in range(3)]
    draws = [built.train_step(jax.tree.map(jnp.copy, state), built.put(each))[1]["loss"] for each in numbers]
    assert len({float(draw) for draw in draws}) == 3
    expected = jax.random.normal(jax.random.fold_in(state["rng"], 1), (3,)).sum()
    assert float(draws[1]) == float(expected)
    built.stream.restore(built.beginning)
    built.stream.skip([0])
    assert next(built.stream)["number"] == 1
    from runner.train.evaluator import EvaluationRun

    moved, _ = built.train_step(state, built.put(numbers[0]))
    measured = built.evaluator(["eval"], moved, EvaluationRun(built.eval_step, tmp_path, "x"))["eval"]
    assert measured["loss"] == pytest.approx(np.abs(moved["weights"]["params"]).mean())
    assert measured["all"] == pytest.approx(np.asarray(moved["weights"]["params"]).sum())


def test_a_program_may_be_an_object_a_function_or_a_namedtuple_and_gets_what_its_names_say(tmp_path: Path) -> None:
    code = GOOD.replace("class Program", "class Own")
    as_function = (
        code
        + "\ndef Program(num_classes, inputs, num_steps): assert num_steps == 77; return Own(inputs, num_classes)\n"
    )
    assert build_own(tmp_path, as_function, "train.steps=77").measures
    assert build_own(tmp_path, code + "\nProgram = Own((8, 8, 1), 10)\n").measures
    bundle = """
class Program(NamedTuple):
    init: Any
    step: Any
    evaluate: Any = None
own = Own((8, 8, 1), 10)
Program = Program(own.init, own.step, own.evaluate)
"""
    assert build_own(tmp_path, code + bundle).measures


def test_init_may_read_values_and_hold_one_array_twice(tmp_path: Path) -> None:
    """What cannot be traced runs as it is written; a state may hold the same array twice."""
    twice = ('"count": 0}', '"count": 0, "copy": x}')
    reads = change(
        (
            '        return {"params": {"w": 0.1 * jax.random.normal(key, self.sizes)}, ',
            '        x = 0.1 * jax.random.normal(key, self.sizes)\n        float(x[0, 0])\n        return {"params": {"w": x}, ',
        ),
        twice,
        ('return {"params": params, ', 'return {**state, "params": params, '),
    )
    built = build_own(tmp_path, reads)
    state = built.init()
    begin, _ = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(state["weights"]["params"]["w"], 0.1 * jax.random.normal(begin, (64, 10)))
    state, _ = built.train_step(state, built.put(first_batch(built)))
    assert int(state["step"]) == 1
    assert float(jnp.abs(state["rest"]["copy"]).sum()) > 0


SAMPLE = "\n    def sample(self, state, key):\n        "


def test_samples_are_pictures_or_texts(tmp_path: Path) -> None:
    from runner.config.evaluations import SamplesEvaluation, TextEvaluation

    pictures = build_own(
        tmp_path, GOOD + SAMPLE + "return jax.random.uniform(key, (9, 8, 8))\n", "eval=[metrics,samples]"
    )
    png = pictures.evaluator.maker.make_content(SamplesEvaluation(count=4), pictures.init())
    assert isinstance(png, bytes)
    assert png == pictures.evaluator.maker.make_content(SamplesEvaluation(count=4), pictures.init())
    text = build_own(
        tmp_path,
        GOOD + SAMPLE + "return [f\"{float(state['params']['w'].sum()):.3f}\", 'b', 'c']\n",
        "eval=[metrics,text]",
    )
    made = text.evaluator.maker.make_content(TextEvaluation(count=2), text.init())
    assert isinstance(made, str)
    assert "\nb\n" in made
    assert "\nc\n" not in made


# --- what is refused, each in one line ---

BAD: dict[str, tuple[str, str]] = {
    "init is missing": (
        change(("def init", "def initialize")),
        r"has no function init\(key, example\); did you mean that by initialize",
    ),
    "step is missing": (
        change(("def step", "def train_step")),
        r"has no function step\(state, batch, key\); did you mean that by train_step",
    ),
    "evaluate is missing": (
        change(("def evaluate", "def eval")),
        r"eval.eval: .* has no function evaluate\(state, batch\); give it one: score.metric",
    ),
    "step takes no key": (
        change(("state, batch, key):", "state, batch):")),
        r"step\(state, batch\) cannot be called as step\(state, batch, key\)",
    ),
    "an option is needed": (change(("lr=0.1", "rate")), r"it asks for rate; give it as \+program.options.rate=…"),
    "one thing is returned": (
        change(('}, {"loss": loss}', "}")),
        r"step gave a dict with params, count; expected \(state, metrics\)",
    ),
    "metrics are a number": (
        change(('{"loss": loss}', "loss")),
        r"step gave the metrics an array of shape \(\); expected a dict",
    ),
    "a metric per example": (
        change(('{"loss": loss}', '{"loss": self.losses(params, batch)}')),
        r'step gave "loss" as an array of shape \(64,\); expected one real number',
    ),
    "a complex metric": (change(('{"loss": loss}', '{"loss": loss * 1j}')), r"expected one real number"),
    "a text": (change(('{"loss": loss}', '{"loss": "low"}')), r'step gave "loss" as str'),
    "a taken name": (change(('{"loss": loss}', '{"step": loss}')), r"may not be called 'step'"),
    "a mean in evaluate": (
        change(('self.losses(state["params"], batch), ', 'self.losses(state["params"], batch).mean(), ')),
        r'evaluate: "loss" is an array of shape \(\); expected one value per example',
    ),
    "the state loses a part": (
        change((', "count": state["count"] + 1}', "}")),
        r"step changes the structure of the state: it leaves out count",
    ),
    "the state gains a part": (change(('state["count"] + 1}', 'state["count"] + 1, "extra": loss}')), r"it adds extra"),
    "a shape changes": (
        change(('"count": state["count"] + 1', '"count": jnp.ones(2, int)')),
        r"step changes count of the state from int32\[\] to int32\[2\]",
    ),
    "a type changes": (
        change(('"count": 0', '"count": jnp.int32(0)'), ('state["count"] + 1}', 'state["count"] + 1.5}')),
        r"step changes count of the state from int32\[\] to float32\[\]",
    ),
    "a function in the state": (
        change(('"count": 0', '"count": jax.nn.relu')),
        r"init gave a state in which count is .*; expected arrays and random keys alone.*eqx.partition",
    ),
    "keys that cannot be sorted": (
        change(('"count": 0}', '"count": 0, 1: 2}')),
        r"init gave a state that jax cannot take apart",
    ),
    "an empty state": (
        change(('{"params": {"w": 0.1 * jax.random.normal(key, self.sizes)}, "count": 0}', "{}")),
        r"init gave a state without arrays",
    ),
    "two arrays of one name": (change(('"count": 0}', '"count": 0, "params.w": 1}')), r"two arrays called params.w"),
    "weights name nothing": (
        change(("class Program:", "class Program:\n    weights = ('parms',)")),
        r"weights names 'parms', but the state has no such part; it has: count, params",
    ),
    "numpy draws in step": (
        change(('{"loss": loss}', '{"loss": loss + np.random.rand()}')),
        r"step is not pure, two calls differ",
    ),
    "numpy draws in a jitted step": (
        change(
            ("    def step", "    @functools.partial(jax.jit, static_argnums=0)\n    def step"),
            ('{"loss": loss}', '{"loss": loss + np.random.rand()}'),
        ),
        r"step is not pure",
    ),
    "numpy draws in init": (change(("0.1 * jax", "np.random.rand() * jax")), r"init is not pure"),
    "numpy draws in evaluate": (
        change(('"accuracy": right', '"accuracy": right + np.random.rand()')),
        r"evaluate is not pure",
    ),
    "a counter outside of the state": (
        change(('{"loss": loss}', '{"loss": loss + self.count()}'))
        + "    def count(self): self.n = getattr(self, 'n', 0) + 1; return self.n\n",
        r"step is not pure",
    ),
    "a large array from outside": (
        change(('{"loss": loss}', '{"loss": loss + jnp.asarray(np.random.rand(1000)).sum()}')),
        r"step is not pure",
    ),
    "a value of an earlier call": (
        change(
            ('{"loss": loss}', '{"loss": loss + getattr(self, "last", 0)}'),
            (
                "        params = jax",
                "        self.last, held = loss, getattr(self, 'last', 0)\n        loss = loss + held\n        params = jax",
            ),
        ),
        r"step is not pure, it keeps a value of an earlier call|not pure",
    ),
    "the host is asked": (
        change(
            (
                '{"loss": loss}',
                '{"loss": loss + jax.pure_callback(lambda: np.float32(np.random.rand()), jax.ShapeDtypeStruct((), jnp.float32))}',
            )
        ),
        r"what the host is asked for in step differs from call to call",
    ),
    "a value is read": (
        change(('{"loss": loss}', '{"loss": float(loss)}')),
        r"step reads the value of an array while it is traced",
    ),
    "an error in step": (
        change(('{"loss": loss}', '{"loss": loss / self.nothing}')),
        r"AttributeError: .*nothing.*\(.*program\d+.py, line \d+\)",
    ),
    "an error in init": (change(("0.1 *", "1 / 0 *")), r"ZeroDivisionError.*line \d+"),
    "an error on construction": (change(("self.lr = (int", "self.lr = 1 / 0, (int")), r"ZeroDivisionError|unpack"),
    "it is a number": ("Program = 3\n", r"has no function init"),
    "weights are no names": (
        change(("class Program:", "class Program:\n    weights = {1: 2}")),
        r"weights is a dict with 1; expected names",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(tmp_path: Path, name: str) -> None:
    code, said = BAD[name]
    with pytest.raises(ConfigError, match=said) as caught:
        build_own(tmp_path, code)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(("program.target: ", "eval."))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=0.1"], r"optim.lr: a program does its own update"),
        (["optim=sgd"], r"optim: a program does its own update"),
        (["model=mlp"], r"model: a program does its own update"),
        (["schedule=constant"], r"schedule: a program"),
        (["objective=classify"], r"objective: a program"),
        (["train.microbatches=2"], r"train.microbatches=2: how a batch is split is a program's own business"),
        (["train.precision=bf16"], r"train.precision=bf16: in which precision it computes is a program's own"),
        (["remat=full"], r"remat=full: what is recomputed is a program's own business"),
        (["eval=[metrics,reconstructions]"], r"eval.reconstructions: a program makes no reconstructions"),
        (["eval=[metrics,ema]"], r"no average is kept; leave it out: its state has"),
        (["program.options.rate=1"], r"program.options.rate: .*:Program has no such option"),
        (["data=none", "train.steps=null", "train.epochs=1"], r"train.epochs: with data=none"),
        (["data=none", "+ckpt.save.e={kind: epochs}"], r"ckpt.save.e: with data=none there are no epochs"),
    ],
)
def test_what_a_program_does_by_itself_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_own(tmp_path, GOOD, *words)


def test_what_is_for_a_program_alone_needs_one() -> None:
    with pytest.raises(ConfigError, match=r"data=none is for a program"):
        compose_run(["data=none"])
    document = compose_run([]).config.document
    with pytest.raises(ConfigError, match=r"optim.kind=program is for a program of your own"):
        validate_config({**document, "optim": {"kind": "program"}})


def test_pictures_of_another_shape_are_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sample gave an array of shape \(9, 64\); expected pictures"):
        build_own(tmp_path, GOOD + SAMPLE + "return jax.random.uniform(key, (9, 64))\n", "eval=[metrics,samples]")
    with pytest.raises(ConfigError, match=r"eval.samples: .* has no function sample\(state, key\)"):
        build_own(tmp_path, GOOD, "eval=[metrics,samples]")
    built = build_own(tmp_path, GOOD + SAMPLE + "return 3\n", "eval=[metrics,text]")
    from runner.config.evaluations import TextEvaluation

    with pytest.raises(HoldfastError, match=r"sample gave .*; expected a text"):
        built.evaluator.maker.make_content(TextEvaluation(), built.init())


def test_a_document_without_a_program_is_hashed_as_before() -> None:
    from runner.config.identity import hash_config

    document = compose_run([]).config.document
    assert json.dumps(document["program"]) == '{"kind": "none"}'
    without = {key: value for key, value in document.items() if key != "program"}
    assert hash_config(document) == hash_config(without)
