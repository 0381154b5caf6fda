"""Programs that were written by others, or by somebody unlucky: what of them works, and what is told in one line."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.__main__ import main
from runner.checkpoint import store
from runner.errors import ConfigError
from runner.launch.compose import compose_run
from runner.train.build import read_train_state
from tests.train.test_program import GOOD, build_own, change, first_batch

# A number of Python's whose type the first step decides, as a return that begins with 0 in an agent's environment.
RETURNS = """
class Program:
    def init(self, key, example):
        return {"params": jnp.zeros(3), "returns": jnp.zeros(4, jnp.int32) * 0 + 0, "total": 0, "twice": 1, "steps": 0}
    def step(self, state, batch, key):
        reward = jax.random.uniform(key)
        total = state["total"] + reward
        new = {**state, "total": total, "twice": state["twice"] * state["total"], "steps": state["steps"] + 1}
        scanned, _ = jax.lax.scan(lambda carry, _: (carry * 0.5, None), state["total"], None, 3)
        return new, {"loss": total + scanned}
    def evaluate(self, state, batch):
        return {"loss": state["total"] * 0.5}
"""


def test_a_number_of_init_has_the_type_that_a_step_gives_it(tmp_path: Path) -> None:
    """As in a loop of Python's, and as a scan promotes what it carries; whole numbers stay whole."""
    built = build_own(tmp_path, RETURNS, data="none")
    rest = {name: leaf.dtype for name, leaf in built.abstract["rest"].items()}
    assert (rest["total"], rest["twice"], rest["steps"]) == (jnp.float32, jnp.float32, jnp.int32)
    assert {name: leaf.dtype for name, leaf in built.init()["rest"].items()} == rest
    state, _ = built.train_step(built.init(), built.put(first_batch(built)))
    assert 0 < float(state["rest"]["total"]) < 1


PART = '"count": 0}'


def with_part(begins: str, goes_on: str = 'state["x"]') -> str:
    """Return a program whose state has one more part."""
    return change(
        (PART, f'"count": 0, "x": {begins}}}'),
        ('"count": state["count"] + 1}', f'"count": state["count"] + 1, "x": {goes_on}}}'),
    )


@pytest.mark.parametrize(
    ("begins", "said"),
    [
        ("np.zeros((), jax.dtypes.float0)", r"x is of float0, the gradient of whole numbers, .*leave it out"),
        ("2**40", r"x is 1099511627776, more than 32 bits hold"),
        ('"text"', r"x is str; expected arrays"),
    ],
)
def test_a_state_that_cannot_be_kept_is_told(tmp_path: Path, begins: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_own(tmp_path, with_part(begins))


def test_nan_in_the_first_state_is_told_before_a_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"init gave a state in which x is NaN"):
        build_own(tmp_path, with_part("jnp.array([0.0, jnp.nan])")).init()
    reads = with_part("float(jnp.ones(())) * jnp.nan")
    with pytest.raises(ConfigError, match=r"init gave a state in which x is NaN"):
        build_own(tmp_path, reads).init()
    assert math.isinf(build_own(tmp_path, with_part("-jnp.inf")).init()["rest"]["x"])


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        ("jnp.ones(3, jnp.int4)", 'state["x"]'),
        ("jnp.ones(3, jnp.float8_e4m3fn)", 'state["x"] * jnp.asarray(1.5, jnp.float8_e4m3fn)'),
        ('jax.random.key(0, impl="rbg")', 'jax.random.fold_in(state["x"], 1)'),
        ("jnp.zeros((64, 8, 8, 1))", 'batch["inputs"]'),
    ],
)
def test_unusual_leaves_come_back_bit_for_bit(tmp_path: Path, begins: str, goes_on: str) -> None:
    built = build_own(tmp_path, with_part(begins, goes_on))
    state, _ = built.train_step(built.init(), built.put(first_batch(built)))
    store.write_checkpoint(tmp_path / "1", state, {})
    back = read_train_state(built, tmp_path / "1")["rest"]["x"]
    is_key = jnp.issubdtype(back.dtype, jax.dtypes.prng_key)
    before, after = (jax.random.key_data(each) if is_key else each for each in (state["rest"]["x"], back))
    assert before.dtype == after.dtype
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_recomputation_of_a_program_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(GOOD)
    assert main(["remat", f"program={tmp_path / 'own.py'}:Program", "data=digits"]) == 2
    assert "remat: what is recomputed is a program's own business" in capsys.readouterr().err


def test_a_file_that_is_not_here_says_where_to_type_the_command() -> None:
    with pytest.raises(ConfigError, match=r"there is no file nowhere.py; check the path, or run it where the file is"):
        compose_run(["program=nowhere.py:Program"])


def test_a_run_typed_as_a_verb_says_what_starts_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["program=own.py:Program", "data=digits"]) == 2
    assert "a run is started by holdfast or python run.py" in capsys.readouterr().err


@pytest.mark.parametrize("name", [r"a\nb", r"a\x1b[31m", r"a\u202eb"])
def test_a_metric_has_a_name_that_can_be_printed(tmp_path: Path, name: str) -> None:
    """It stands in a line of the console and of the log."""
    with pytest.raises(ConfigError, match=r"a metric may not be called '"):
        build_own(tmp_path, change(('{"loss": loss}', f'{{"loss": loss, "{name}": loss}}')))
    with pytest.raises(ConfigError, match=r"evaluate: a metric may not be called '"):
        build_own(tmp_path, change(('"accuracy": right', f'"{name}": right')))
    assert build_own(tmp_path, change(('{"loss": loss}', '{"loss": loss, "точность 1": loss}'))).measures


@pytest.mark.parametrize("jitted", [False, True])
def test_an_array_that_init_keeps_outside_of_the_state_is_told(tmp_path: Path, jitted: bool) -> None:
    """Init is traced, and what it makes there is no array; what is no array, or is made before, may be kept."""
    code = change(
        ('        return {"params": {"w"', '        self.kept = jnp.arange(3.0).sum()\n        return {"params": {"w"'),
        ('{"loss": loss}', '{"loss": loss * self.kept}'),
    )
    if jitted:
        code = code.replace("    def step", "    @functools.partial(jax.jit, static_argnums=0)\n    def step")
    with pytest.raises(ConfigError, match="step uses an array that init or another function has kept outside"):
        build_own(tmp_path, code)
    assert build_own(tmp_path, code.replace("jnp.arange(3.0).sum()", "np.arange(3.0).sum()")).measures
