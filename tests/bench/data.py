"""How fast batches come, without a model: `python -m tests.bench.data [SECONDS]`.

Each pipeline as its YAML has it, by itself and with two workers, beside what the default step consumes on this machine
(model=gpt data=stdlib, measured here as well). One process at a time; a worker competes with the others for cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data import Arrayrecord, Digits, Images, Parquet, Stdlib, Tokens
from data.option_fields import Augmentation
from runner.train.dataset import make_stream
from tests.conftest import REPO

SECONDS = 3.0
STEPS = 150


def pipelines(root: Path) -> dict[str, Any]:
    """What is measured: the default, and one of each way to read."""
    return {
        "stdlib (the default)": Stdlib(),
        "digits": Digits(),
        "digits, augmented": Digits(augment=Augmentation(crop=1, noise=0.1)),
        "tokens, mapped, 1024 × 16": _tokens(root),
        "images 32 × 32, crop and flip": _images(root),
        "images 224 × 224, first time": _images(root, 224),
        "parquet, 64 features": _parquet(root),
        "arrayrecord, 32 × 32": _records(root),
    }


def _tokens(root: Path) -> Tokens:
    from data.encodings import EncodingChoice
    from data.token_writer import find_documents, write_token_files

    documents = find_documents([Path(os.__file__).parent], "*.py")
    if not (root / "tokens").exists():
        write_token_files(
            documents, root / "tokens", EncodingChoice("bytes"), eval_fraction=0.05, workers=1, progress=lambda *_: None
        )
    return Tokens(path=str(root / "tokens"), seq_len=1024)


def _images(root: Path, size: int = 32) -> Images:
    from PIL import Image

    folder, rng = root / f"images{size}", np.random.default_rng(0)
    for number in range(2000 if size == 32 else 1000):
        file = folder / f"{number % 10}/{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((size * 2, size * 2)).save(file)
    return Images(path=str(folder), size=size, augment=Augmentation(crop=4, flip=True))


def _parquet(root: Path) -> Parquet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = np.random.default_rng(0).random((100_000, 64), np.float32)
    pq.write_table(pa.table({"x": list(features), "y": np.arange(100_000) % 10}), root / "t.parquet")
    return Parquet(path=str(root / "t.parquet"), inputs="x", label="y", gives="features")


def _records(root: Path) -> Arrayrecord:
    import io

    from array_record.python.array_record_module import ArrayRecordWriter

    writer, rng = ArrayRecordWriter(str(root / "d.array_record"), "group_size:1"), np.random.default_rng(0)
    for number in range(10_000):
        out = io.BytesIO()
        np.savez(out, inputs=rng.integers(0, 256, (32, 32, 3), np.uint8), label=number % 10)
        writer.write(out.getvalue())
    writer.close()
    return Arrayrecord(path=str(root / "d.array_record"), num_classes=10)


def per_second(option: Any, seconds: float) -> float:
    """Batches a second, after the first few."""
    stream = make_stream(option, option.sources(), seed=0)
    for _ in range(5):
        next(stream)
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        next(stream)
        count += 1
    stream.close()
    return count / elapsed


def consumed() -> float:
    """Steps a second of the default experiment, from its timing.jsonl: the median of its intervals."""
    import json

    with tempfile.TemporaryDirectory() as place:
        words = ("train.eval_steps=1000", f"train.steps={STEPS}", "log.tensorboard=false", "ckpt=none")
        subprocess.run([sys.executable, str(REPO / "run.py"), *words], cwd=place, check=True, capture_output=True)
        (timing,) = Path(place).glob("outputs/*/*/logs/timing.jsonl")
        lines = [json.loads(line) for line in timing.read_text().splitlines()]
    return float(np.median([line["steps"] / line["seconds"] for line in lines if line["event"] == "train"][1:]))


def main(seconds: float) -> None:
    needed = consumed()
    print(f"the default step consumes {needed:.1f} batches/s on {os.cpu_count()} cores\n")
    print(f"{'batches/s':<34}{'workers=0':>12}{'workers=2':>12}{'÷ step':>10}")
    with tempfile.TemporaryDirectory() as place:
        for name, option in pipelines(Path(place)).items():
            alone, helped = (per_second(replace(option, workers=workers), seconds) for workers in (0, 2))
            print(f"{name:<34}{alone:>12,.0f}{helped:>12,.0f}{alone / needed:>9.0f}×", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
