"""Small data of every kind, written to a folder: what the tests of data, workers and identity read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from data import (
    Arrayrecord,
    Arrays,
    Chat,
    Csv,
    Digits,
    Hub,
    Images,
    Parquet,
    Preferences,
    Stdlib,
    Synthetic,
    Text,
    Tokens,
)
from data.option_fields import Augmentation

SIZE, NUM_CLASSES = 90, 3
VARIED = Augmentation(crop=1, flip=True, erase=0.5, brightness=0.1, noise=0.1)


def examples(size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Images UInt8[size 8 8 3] and a label for each."""
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (size, 8, 8, 3), np.uint8), np.arange(size) % NUM_CLASSES


def a_digits(root: Path) -> Digits:
    return Digits(batch_size=8, augment=VARIED)


def a_synthetic(root: Path) -> Synthetic:
    return Synthetic(gives="images", size=64, image_size=8, batch_size=8)


def a_stdlib(root: Path) -> Stdlib:
    return Stdlib(batch_size=8, seq_len=16)


def a_text(root: Path) -> Text:
    texts(root / "texts")
    return Text(path=str(root / "texts"), seq_len=16, batch_size=8)


def texts(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"{n:02}.txt").write_text("".join(f"{n} and {i} make {n + i}.\n" for i in range(20)))
    return folder


def a_chat(root: Path) -> Chat:
    lines = [
        {"messages": [{"role": "user", "content": f"{n} and {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
        for n in range(SIZE)
    ]
    (root / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Chat(path=str(root / "chat.jsonl"), seq_len=64, batch_size=8)


def a_preferences(root: Path) -> Preferences:
    lines = [{"prompt": f"{n} and {n}?", "chosen": f"{2 * n}.", "rejected": f"{2 * n + 1}?"} for n in range(SIZE)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Preferences(path=str(root / "pairs.jsonl"), seq_len=64, batch_size=8)


def write_chat_tokenizer(folder: Path, template: Any) -> Path:
    """A folder as Hugging Face has them: a tokenizer of bytes with a few longer tokens, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a user and an assistant talk of numbers, and of numbers alone"] * 4, trainer)
    special = ("<s>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def a_tokens(root: Path) -> Tokens:
    from data.encodings import EncodingChoice
    from data.token_writer import find_documents, write_token_files

    documents = find_documents([texts(root / "texts")], "*.txt")
    quiet: Callable[[int, int], None] = lambda done, tokens: None  # noqa: E731
    write_token_files(documents, root / "tokens", EncodingChoice("bytes"), eval_fraction=0.2, workers=1, progress=quiet)
    return Tokens(path=str(root / "tokens"), seq_len=16, batch_size=8)


def an_arrays(root: Path, **columns: Any) -> Arrays:
    inputs, label = examples()
    np.savez(root / "arrays.npz", **{"inputs": inputs, "label": label, **columns})
    return Arrays(path=str(root / "arrays.npz"), batch_size=8, augment=VARIED)


def an_images(root: Path) -> Images:
    from PIL import Image

    inputs, label = examples()
    for number, (pixels, which) in enumerate(zip(inputs, label, strict=True)):
        file = root / f"images/{['cat', 'dog', 'owl'][which]}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return Images(path=str(root / "images"), size=8, batch_size=8, augment=VARIED)


def a_parquet(root: Path) -> Parquet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    inputs, label = examples()
    table = {"x": list(inputs.reshape(SIZE, -1)[:, :5].astype(np.float32)), "a": inputs[:, 0, 0, 0], "y": label}
    pq.write_table(pa.table(table), root / "table.parquet")
    return Parquet(path=str(root / "table.parquet"), inputs="x", label="y", gives="features", batch_size=8)


def a_csv(root: Path) -> Csv:
    inputs, label = examples()
    rows = [[*pixels.reshape(-1)[:5].tolist(), which] for pixels, which in zip(inputs, label.tolist(), strict=True)]
    lines = ["a,b,c,d,e,y", *(",".join(map(str, row)) for row in rows)]
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    return Csv(path=str(root / "table.csv"), label="y", batch_size=8)


def an_arrayrecord(root: Path) -> Arrayrecord:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(root / "data.array_record"), "group_size:1")
    for pixels, which in zip(*examples(), strict=True):
        out = io.BytesIO()
        np.savez(out, inputs=pixels, label=which)
        writer.write(out.getvalue())
    writer.close()
    return Arrayrecord(path=str(root / "data.array_record"), num_classes=NUM_CLASSES, batch_size=8, prefetch=2)


def a_hub(root: Path) -> Hub:
    import datasets

    inputs, label = examples()
    columns = {"image": list(inputs.reshape(SIZE, -1)[:, :5].astype(np.float32)), "label": label.tolist()}
    datasets.Dataset.from_dict(columns).save_to_disk(str(root / "hub"))
    return Hub(path=str(root / "hub"), gives="features", batch_size=8)


MADE: dict[str, Callable[[Path], Any]] = {
    "digits": a_digits,
    "synthetic": a_synthetic,
    "stdlib": a_stdlib,
    "text": a_text,
    "chat": a_chat,
    "preferences": a_preferences,
    "tokens": a_tokens,
    "arrays": an_arrays,
    "images": an_images,
    "parquet": a_parquet,
    "csv": a_csv,
    "arrayrecord": an_arrayrecord,
    "hub": a_hub,
}
MODEL = {"tokens": "gpt", "images": "mlp", "features": "mlp"}


def command(option: Any) -> list[str]:
    """What a user types to train on it."""
    keys = ("path", "gives", "num_classes", "inputs", "label", "seq_len", "batch_size", "size", "image_size")
    settable = {field.name for field in fields(option)}  # what an option always gives is no field
    given = {key: value for key in keys if key in settable and (value := getattr(option, key)) is not None}
    words = [f"data.{key}={json.dumps(value)}" for key, value in given.items()]
    return [f"data={option.kind}", f"model={MODEL[option.gives]}", *words]
