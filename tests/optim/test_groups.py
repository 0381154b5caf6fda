"""`optim.groups`: some parameters have a learning rate or a weight decay of their own, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.name_patterns import find_unused
from runner.config.identity import classify_key, hash_config
from runner.errors import ConfigError
from runner.optim.grouped_updates import build_optimizer, check_groups, label_groups
from runner.optim.optimizers import AdamW, ExternalOptim, ParameterGroup, Sgd
from runner.optim.optimizers import Optim as OptimOption
from runner.train.build import build
from tests.conftest import composed
from tests.optim.test_optim import MLP, tree

OPTIONS = [option() for option in get_args(OptimOption) if option is not ExternalOptim]
RATE = 0.01


def updates(option: Any, steps: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    """What an optimizer makes of some gradients, by the path of the parameter."""
    params = tree()
    tx = build_optimizer(option, lambda step: RATE * (1 + jnp.asarray(step)))
    state, found = tx.init(params), params
    for step in range(steps):
        grads = jax.tree.map(lambda leaf, step=step: jnp.sin(step + jnp.arange(leaf.size).reshape(leaf.shape)), params)
        found, state = tx.update(grads, state, params)
    paths = jax.tree_util.tree_leaves_with_path(found)
    return {".".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in paths}


def with_groups(option: Any, **groups: ParameterGroup) -> Any:
    return replace(option, groups=groups)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.kind)
def test_a_group_that_asks_for_nothing_of_its_own_changes_no_bit(option: Any) -> None:
    """Also where the gradient is clipped to its norm, which is that of all parameters together."""
    before, after = updates(option), updates(with_groups(option, some=ParameterGroup(match=("blocks", "conv.bias"))))
    assert before.keys() == after.keys()
    # Muon orthogonalizes all matrices of a part together, so another part rounds otherwise.
    same = np.array_equal if option.kind != "muon" else partial(np.allclose, rtol=1e-4, atol=1e-6)
    assert all(same(before[name], after[name]) for name in before)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.kind)
def test_a_group_has_its_multiple_of_the_learning_rate(option: Any) -> None:
    before = updates(option)
    after = updates(with_groups(option, slow=ParameterGroup(match=("blocks.up", "bn"), lr=0.25)))
    for name in before:
        times = 0.25 if name.startswith(("blocks.up.", "bn.")) else 1.0
        assert np.allclose(after[name], times * before[name], rtol=1e-4, atol=1e-6), name


def test_a_group_has_its_own_weight_decay() -> None:
    option = with_groups(AdamW(weight_decay=0.1), none=ParameterGroup(match=("embed",), weight_decay=0.0))
    before, after, free = updates(AdamW(weight_decay=0.1)), updates(option), updates(AdamW(weight_decay=0.0))
    assert np.allclose(after["embed.embedding"], free["embed.embedding"], rtol=1e-6)
    assert not np.allclose(after["embed.embedding"], before["embed.embedding"], rtol=1e-3)
    assert np.array_equal(after["conv.kernel"], before["conv.kernel"])


def test_groups_are_named_in_the_tree() -> None:
    groups = {"a": ParameterGroup(match=("bias",)), "b": ParameterGroup(match=("embed*",))}
    labels = label_groups(groups, tree())
    assert labels["conv"] == {"kernel": "", "bias": "a"}
    assert labels["embed"] == {"embedding": "b"}


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"a": ("haed",)}, "optim.groups.a: no parameter that trains is called 'haed'"),
        ({"a": ("embed",), "b": ("emb*",)}, "embed.embedding is in a and in b; narrow the patterns"),
        ({"a": ("conv.kernal",)}, "did you mean conv.kernel?"),
    ],
)
def test_a_pattern_that_names_nothing_and_groups_that_overlap_are_refused(groups: Any, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_groups({name: ParameterGroup(match=match) for name, match in groups.items()}, tree())
    assert says in str(refused.value)


def test_they_come_from_the_command_line() -> None:
    built = build(composed(*MLP, "optim=sgd", "+optim.groups.out={match: [head], lr: 0.5, weight_decay: 0}"))
    assert "opt" in built.abstract
    with pytest.raises(ConfigError, match=r"optim.groups.out: no parameter that trains is called 'haed'; did you mean"):
        build(composed(*MLP, "+optim.groups.out={match: [haed]}"))
    with pytest.raises(ConfigError, match=r"optim.groups.out.lr: got 0; expected more than 0"):
        composed(*MLP, "+optim.groups.out={match: [head], lr: 0}")


def test_what_has_no_groups_is_the_run_it_was() -> None:
    document = composed(*MLP).document
    del document["optim"]["groups"]
    del document["tune"]
    assert hash_config(document) == hash_config(composed(*MLP).document)
    assert classify_key("optim.groups.head.lr") == "identity"
    assert classify_key("tune.rank") == "identity"


def test_one_pattern_of_several_that_names_nothing_is_found() -> None:
    assert find_unused(("a", "c"), ["a.b"]) == "c"
    assert find_unused(("a", "b"), ["a.b"]) is None
    assert Sgd().groups == {}
