"""Jobs of a sweep are composed as Hydra composes each of them alone, and what they have in common only once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from runner.errors import ConfigError
from runner.launch.compose import compose
from runner.launch.job_composer import JobComposer

SWEEPS = [
    ["seed=0,1", "model=mlp", "data=digits", "optim.lr=0.1,0.2"],
    ["model=mlp,cnn", "data=digits", "seed=0,1"],
    ["ckpt=periodic,best", "train.steps=5,6", "+ckpt.save.mine={kind: steps, steps: 3}"],
    ["model=mlp", "data=digits", "+model.nothing={a: 1},{b: 2}"],
    ["model=mlp", "data=digits", "ckpt.save={},{periodic: {kind: steps, steps: 4}}"],
    ["model=mlp", "data=digits", "~ckpt.save.best", "seed=0,1"],
    ["experiment=digits_mlp,digits_cnn", "seed=0,1"],
    ["name=a,b", "seed=${oc.env:NO_SUCH,7}", "model=mlp", "data=digits"],
    ["retention.remote=all,last_n", "seed=0,1"],
    ["remote=file:///a,file:///b", "seed=0,1"],
    ["schedule=constant,linear", "optim=adamw,lion", "optim.lr=0.1"],
    ["eval=[metrics,text],metrics", "seed=1,2"],
]


@pytest.mark.parametrize("words", SWEEPS, ids=[" ".join(words)[:50] for words in SWEEPS])
def test_each_job_is_what_hydra_makes_of_it_alone(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    real = JobComposer.compose

    def compose_both(self: JobComposer, job: list[str]) -> Any:
        alone = self._loader.load_sweep_config(self._master, list(job))
        quick = real(self, job)
        compared.append(tuple(OmegaConf.to_container(each, resolve=False) for each in (quick, alone)))
        assert [OmegaConf.is_struct(each) for each in (quick, alone)] == [True, True]
        return quick

    monkeypatch.setattr(JobComposer, "compose", compose_both)
    # Whether a configuration is a good one is judged later: what was composed is compared all the same.
    with suppress(ConfigError):
        compose(["-m", *words])
    assert len(compared) >= 2
    for quick, alone in compared:
        assert quick == alone


def test_hydra_composes_what_they_share_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[list[str]] = []
    real = ConfigLoaderImpl.load_sweep_config

    def count(self: ConfigLoaderImpl, master: Any, words: list[str]) -> Any:
        made.append(words)
        return real(self, master, words)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", count)
    request = compose(["-m", "seed=range(0,40)", "model=mlp,cnn", "data=digits"])
    assert len(request.runs) == 80  # type: ignore[union-attr]
    assert made == [["model=mlp", "data=digits"], ["model=cnn", "data=digits"]]
