"""A metric that something is chosen by is one that is measured: names, evaluations, and which way is better."""

from __future__ import annotations

import dataclasses

import pytest

from runner.config.metric_names import check_metric_names, list_chosen_metrics, warn_of_worst_as_best
from runner.errors import ConfigError
from tests.conftest import composed

MLP = ("model=mlp", "data=digits")
GPT = ("model=gpt", "data=stdlib")
VAE = ("model=vae", "data=digits")
OWN = (*MLP, "objective=external", "objective.target=tests.config.test_metric_names:gives_f1")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((*MLP, "score.metric=eval/acuracy"), r"^score.metric=eval/acuracy: .*; did you mean eval/accuracy\?$"),
        ((*MLP, "score.metric=eval/acc"), r"did you mean eval/accuracy\?$"),
        ((*MLP, "score.metric=accuracy"), r"no evaluation named 'accuracy'.*; did you mean eval/accuracy\?$"),
        ((*MLP, "score.metric=val_loss"), r"no evaluation named 'val_loss'.*; did you mean eval/loss\?$"),
        ((*MLP, "score.metric=eval"), "eval does not measure that; it measures eval/loss"),
        ((*MLP, "ckpt.save.best.metric=eval/los"), r"^ckpt.save.best.metric=eval/los: .*eval/loss\?$"),
        ((*MLP, "retention.best.metric=evals/loss"), r"^retention.best.metric=evals/loss: no .*eval/loss\?$"),
        ((*MLP, "stop.metric=eval/lss"), r"^stop.metric=eval/lss: .*did you mean eval/loss\?$"),
        ((*MLP, "score.metric=eval/bits_per_byte"), "it measures eval/loss, eval/accuracy"),
        ((*GPT, "score.metric=eval/accuracy"), "it measures eval/loss, eval/bits_per_byte"),
        ((*VAE, "score.metric=eval/accuracy"), "it measures eval/loss, eval/reconstruction, eval/kl"),
        ((*MLP, "score.metric=eval/lr"), "does not measure that"),
        ((*MLP, "score.metric=train/loss"), r"a step of training measures its own batch alone; say train_set/loss"),
        ((*MLP, "stop.metric=train/accuracy"), "say train_set/accuracy"),
        ((*MLP, "eval=[metrics,test]", "score.metric=test/accuracy"), "looks at the test set, and nothing is chosen"),
        ((*MLP, "eval=[metrics,test]", "stop.metric=test/loss"), "^stop.metric=test/loss: eval.test looks at the test"),
        ((*MLP, "++eval.eval.split=test_b"), "score.metric=eval/loss: eval.eval looks at the test set"),
        ((*MLP, "++eval.eval.steps=last"), "score.metric=eval/loss: eval.eval.steps=last: is measured once"),
        (("model=vae", "data=digits", "eval=samples"), "add it: eval="),
        # Of a user's own objective the evaluations are known, and the names are not.
        ((*OWN, "score.metric=held/f1"), "no evaluation named 'held' measures anything"),
    ],
)
def test_what_nothing_measures_is_refused_before_jax_starts(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        composed(*words)


@pytest.mark.parametrize(
    "words",
    [
        (*MLP, "score.metric=eval/accuracy", "score.mode=max"),
        (*GPT, "score.metric=eval/bits_per_byte"),
        (*VAE, "score.metric=eval/kl"),
        (*MLP, "eval=[metrics,train_set]", "score.metric=train_set/loss"),
        (*MLP, "eval=[metrics,ema]", "optim.ema=0.9", "stop.metric=ema/accuracy"),
        (*MLP, "eval=[metrics,test]"),
        (*OWN, "score.metric=eval/f1"),
    ],
)
def test_what_is_measured_is_taken(words: tuple[str, ...]) -> None:
    composed(*words)


def test_every_key_that_chooses_is_looked_at() -> None:
    """Rules of saving and of retention, the score, and early stopping; in the order in which they are told."""
    config = composed(*MLP, "stop.metric=eval/accuracy", "stop.mode=max", "score.mode=max")
    assert [(chosen.key, chosen.metric, chosen.mode) for chosen in list_chosen_metrics(config)] == [
        ("score.metric", "eval/loss", "max"),
        ("ckpt.save.best.metric", "eval/loss", "max"),
        ("retention.best.metric", "eval/loss", "max"),
        ("stop.metric", "eval/accuracy", "max"),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("score.metric=eval/f2",),
            r"^score.metric=eval/f2: .*it measures eval/loss, eval/f1; did you mean eval/f1\?$",
        ),
        (("stop.metric=eval/accuracy",), "^stop.metric=eval/accuracy: eval.eval does not measure that"),
        (("retention.best.metric=eval/x",), "^retention.best.metric=eval/x: "),
        (("ckpt.save.best.metric=eval/f",), "^ckpt.save.best.metric=eval/f: "),
    ],
)
def test_what_a_users_objective_measures_is_looked_at_once_it_is_traced(words: tuple[str, ...], line: str) -> None:
    config = composed(*OWN, *words)
    with pytest.raises(ConfigError, match=line):
        check_metric_names(config, {"eval": ["loss", "f1"]})


def test_a_users_metric_that_is_there_is_taken() -> None:
    config = composed(*OWN, "score.metric=eval/f1", "score.mode=max", "stop.metric=eval/loss", "stop.mode=min")
    check_metric_names(config, {"eval": ["loss", "f1"]})
    with pytest.raises(ConfigError, match="score.metric=eval/f1: eval.eval does not measure that; it measures nothing"):
        check_metric_names(config, {})


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("score.metric=eval/accuracy",), ["score.mode=min: the least eval/accuracy counts as the best"]),
        (("score.mode=max",), ["score.mode=max: the most eval/loss counts as the best"]),
        (("stop.metric=eval/accuracy",), ["stop.mode=min: the least eval/accuracy counts as the best"]),
        (
            ("score.mode=max", "retention.best.metric=eval/accuracy", "retention.best.mode=min"),
            ["score.mode=max: the most eval/loss", "retention.best.mode=min: the least eval/accuracy"],
        ),
        (("score.metric=eval/accuracy", "score.mode=max", "stop.metric=eval/loss", "stop.mode=min"), []),
        ((), []),
    ],
)
def test_the_worst_as_the_best_is_warned_of_once(words: tuple[str, ...], lines: list[str]) -> None:
    found = warn_of_worst_as_best(composed(*MLP, *words))
    assert len(found) == len(lines)
    assert all(line in warning for line, warning in zip(lines, found, strict=True))


def test_a_run_that_named_no_such_metric_is_still_looked_at_and_mended() -> None:
    """Its document is read; what the command says now is judged."""
    from runner.config.schema import Config, validate_config, validate_options

    document = dataclasses.asdict(composed(*MLP))
    document["score"]["metric"] = "eval/acuracy"
    assert validate_options(Config, document).score.metric == "eval/acuracy"
    with pytest.raises(ConfigError, match="did you mean eval/accuracy"):
        validate_config(document)
