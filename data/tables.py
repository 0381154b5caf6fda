"""Turn tables of inputs and labels, of any file format, into sources of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from data.bad_examples import OnBad
from data.fingerprint import hash_files
from data.labels import Labels, ReadAs, prepare_labels
from data.sources import IGNORED_LABEL, Source, Sources, Table, split_source
from data.splits import Split

# The dimensions that inputs may have, examples included; images without channels get one.
DIMENSIONS = {"images": (3, 4), "features": (2,), "ids": (2,)}
# What is divided by to bring the pixels of an image to [0, 1].
LARGEST_PIXEL = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
OTHER_PARTS: dict[Split, str] = {"eval": "evaluation", "test": "the test set"}

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class InputFormat:
    """The form that a column of inputs is read in: `gives`, and the size in pixels and channels of an encoded image.

    `on_bad` says what is done about an image that cannot be decoded.
    """

    gives: Literal["images", "features", "ids"]
    size: int
    channels: int
    on_bad: OnBad = "raise"


@dataclass(frozen=True)
class TableFormat:
    """As what a table is read: `gives`, how many classes there are, and what its labels are, where that is said.

    `ignore_label` is a label that is no class and counts nowhere.
    """

    gives: Literal["images", "features", "ids"]
    num_classes: int | None = None
    labels: ReadAs | None = None
    ignore_label: int = IGNORED_LABEL

    def prepare_labels(self, parts: Mapping[Split, Columns]) -> Labels:
        """Return the labels of the parts of a data set. Raises ValueError where they are not what is said here."""
        return prepare_labels(
            [part["label"] for part in parts.values()], self.num_classes, self.labels, self.ignore_label
        )


@dataclass(frozen=True)
class TableParts:
    """The `inputs` and `label` of each part of a data set, `train` at least.

    Attributes:
        columns: those of each part; without `eval`, a fixed part of `train` is held out.
        files: "SIZE HASH" of each file by its name.
        selected: whatever else than the content of the files decides which examples there are.
        said: what a person is told about how the files were read.
    """

    columns: Mapping[Split, Columns]
    files: Mapping[str, str]
    selected: tuple[object, ...] = ()
    said: str = ""


def make_table_sources(parts: TableParts, form: TableFormat, eval_fraction: float) -> Sources:
    """Return the sources of a table in parts; without one to evaluate on, a fixed random part is held out.

    Raises ValueError where the parts are not alike, or an input or a label is not what `form` says.
    """
    columns, said = drop_hidden_test(parts.columns, form.ignore_label)
    labels = form.prepare_labels(columns)
    tables = {
        split: Table({"inputs": prepare_inputs(part["inputs"], form.gives), "label": label})
        for (split, part), label in zip(columns.items(), labels.sides, strict=True)
    }
    shapes = {split: table.columns["inputs"].shape[1:] for split, table in tables.items()}
    for split, other in OTHER_PARTS.items():
        if shapes.get(split, shapes["train"]) != shapes["train"]:
            raise ValueError(
                f"an example is {shapes['train']} in training and {shapes[split]} in {other}; expected one shape"
            )
    train = columns["train"]["inputs"]
    selected = (*parts.selected, *describe_scaling(train.dtype, form.gives))
    values = describe_values(tables["train"].columns["inputs"], form.gives)
    told = "; ".join(filter(None, [parts.said, said, values, describe_layout(shapes["train"])]))
    return make_split_sources(
        tables, shapes["train"], labels, replace(parts, selected=selected, said=told), eval_fraction
    )


def drop_hidden_test(
    columns: Mapping[Split, Columns], ignore_label: int = IGNORED_LABEL
) -> tuple[dict[Split, Columns], str]:
    """Return the parts without a test set whose makers keep its labels to themselves, and what is said about that."""
    label = columns["test"]["label"] if "test" in columns else np.zeros(0)
    for hidden in (-1, ignore_label):
        if label.size and label.dtype.kind in "iuf" and (label == hidden).all():
            kept = dict(columns)
            del kept["test"]
            return kept, f"the test set is left out, for its labels are all {hidden}"
    return dict(columns), ""


def make_split_sources(
    sources: Mapping[Split, Source],
    shape: tuple[int, ...],
    labels: Labels,
    parts: TableParts,
    eval_fraction: float,
    *,
    waits: bool = False,
) -> Sources:
    """Return the sources of the parts of a data set; without one to evaluate on, a fixed random part is held out.

    Of `parts` only the files are looked at, and what is said about them.
    """
    sides: tuple[Source, Source]
    if "eval" in sources:
        sides, drawn = (sources["train"], sources["eval"]), None
    else:
        sides, drawn = split_source(sources["train"], eval_fraction), eval_fraction
    made = make_labelled_sources(sides, shape, labels, parts.files, (drawn, *parts.selected), waits=waits)
    held_out = {"test": sources["test"]} if "test" in sources else {}
    kept = f"{len(held_out['test']):,} test examples are kept apart" if held_out else ""
    return replace(made, summary="; ".join(filter(None, [made.summary, kept, parts.said])), held_out=held_out)


def check_example_shape(shape: tuple[int, ...], gives: str) -> None:
    """Raise ValueError where examples of this shape are not what `gives` says."""
    if len(shape) + 1 not in DIMENSIONS[gives]:
        wanted = "images" if len(shape) > 1 else "features"
        raise ValueError(f"an example is {shape}, which is no {gives}; say data.gives={wanted}")


def make_labelled_sources(
    sides: tuple[Source, Source],
    shape: tuple[int, ...],
    labels: Labels,
    files: Mapping[str, str],
    selected: tuple[object, ...],
    *,
    waits: bool = False,
) -> Sources:
    """Return two sources of labelled examples of one shape, to train and to evaluate on, as Sources.

    `selected` is whatever else than the content of the files decides which examples there are.
    """
    train, held_out = sides
    return Sources(
        train,
        held_out,
        shape,
        labels.num_outputs,
        hash_files(files, *selected),
        f"{len(train):,} + {len(held_out):,} examples (train + eval) of "
        f"{' × '.join(map(str, shape))}{' features' if len(shape) == 1 else ''}, {labels.description}",
        waits=waits,
        files=files,
        classes=labels.classes,
        may_ignore=labels.may_ignore,
        ignore_label=labels.ignore_label,
    )


def prepare_inputs(inputs: np.ndarray, gives: str) -> np.ndarray:
    """Return inputs as a model takes them: float32; pixels of an image scaled to [0, 1]; images with their channels.

    Ids stay whole numbers, as int32. Raises ValueError where one is none that an embedding has.
    """
    if gives == "ids":
        return _prepare_ids(inputs)
    if gives == "images" and inputs.ndim == 3:
        inputs = inputs[..., None]
    # In float32, as encoded images are: the same pixels give the same numbers, whatever they were read from.
    if gives == "images" and (largest := LARGEST_PIXEL.get(inputs.dtype.newbyteorder("="))):
        return inputs.astype(np.float32) / np.float32(largest)
    return inputs.astype(np.float32)


def _prepare_ids(inputs: np.ndarray) -> np.ndarray:
    if inputs.dtype.kind not in "ui":
        raise ValueError(f"inputs is {inputs.dtype}, but ids are whole numbers; write them so (astype(int))")
    low, high = (int(inputs.min()), int(inputs.max())) if inputs.size else (0, 0)
    if low < 0 or high >= 2**31:
        raise ValueError(f"an id is {low if low < 0 else high}; expected 0 or more, and less than {2**31}")
    return inputs.astype(np.int32)


def describe_scaling(dtype: np.dtype[Any], gives: str) -> tuple[str, ...]:
    """Return what a fingerprint needs to know of how inputs are scaled: nothing where they are read as they ever were.

    Pixels of 16 bits were once left as they are: a run on such numbers is not continued on others.
    """
    return ("16 bits / 65535",) if gives == "images" and dtype.newbyteorder("=") == np.uint16 else ()


def describe_layout(shape: tuple[int, ...]) -> str:
    """Return what a person should know about an example that has its channels first, as PyTorch has them."""
    if len(shape) == 3 and shape[0] in (1, 3, 4) and shape[1] == shape[2] > 4:
        return (
            f"an example of {' × '.join(map(str, shape))} has its channels first? np.moveaxis(x, 1, -1) puts them last"
        )
    return ""


def describe_values(inputs: np.ndarray, gives: str) -> str:
    """Return what a person should know about the values of inputs; mostly nothing."""
    if inputs.dtype.kind != "f" or not inputs.size:
        return ""
    # NaN is the smallest and the largest of all where it occurs.
    low, high = float(inputs.min()), float(inputs.max())
    if not np.isfinite([low, high]).all():
        missing = int(inputs.size - np.isfinite(inputs).sum())
        return f"{missing:,} of {inputs.size:,} values of inputs are NaN or infinite"
    if gives == "images" and (low < 0 or high > 1):
        return f"pixels from {low:g} to {high:g}, not scaled"
    return ""
