"""Hugging Face datasets: from the hub, or from a folder that `save_to_disk` left. Needs the extra `hub`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.data_errors import UndecodableError, UnreadableError
from data.fingerprint import hash_files, identify_bytes, identify_file
from data.images import EncodedImages
from data.labels import Labels, holds_label, prepare_labels
from data.option_fields import explain_missing_name
from data.sources import Source, Sources, split_source
from data.splits import find_split
from data.tables import DIMENSIONS, InputFormat, TableFormat, make_labelled_sources, prepare_inputs
from data.text_files import TextRun, join_documents, make_byte_sources, make_byte_windows

# The name of a split, and no expression such as `train[:1000]` or `train+test`.
SPLIT_NAME = re.compile(r"[\w.-]+")
# As `eval_split`: a part of what is trained on is held out, whatever splits the dataset has.
HELD_OUT_PART = "none"


@dataclass(frozen=True)
class HubDataset:
    """Which dataset is read, and which splits of it: one to train on, and perhaps one to evaluate on.

    `path` is a name on the hub or a folder; `subset` and `revision` are of a dataset on the hub. Without `eval_split`
    the dataset's own split for that is taken, where it has one.
    """

    path: str
    subset: str | None
    revision: str | None
    split: str
    eval_split: str | None

    def load_splits(self, columns: list[str]) -> HubSplits:
        """Return the splits that are read.

        Raises ValueError where one cannot be had, or lacks one of the columns (`inputs` first, then perhaps `label`).
        """
        own = self._load_all() if SPLIT_NAME.fullmatch(self.split) else {}
        eval_split = self.eval_split
        if eval_split is None:
            found = [name for name in own if name != self.split and find_split(name) == "eval"]
            # Of several, as MNLI has, none is the one.
            eval_split = found[0] if len(found) == 1 and self.split in own else None
        names = [self.split, *([eval_split] if eval_split not in (None, HELD_OUT_PART) else [])]
        chosen = {name: self._choose(own, name) for name in names}
        for name, dataset in chosen.items():
            if missing := [column for column in columns if column not in dataset.column_names]:
                key = "inputs" if missing[0] == columns[0] else "label"
                known = explain_missing_name(missing[0], dataset.column_names)
                raise ValueError(f"{key}={missing[0]} is no column of {name}{known}")
        tests = {
            name: dataset
            for name, dataset in own.items()
            if name not in names and find_split(name) == "test" and not set(columns) - set(dataset.column_names)
        }
        rest = [name for name in own if name not in (*names, *tests)]
        return HubSplits(self.path, chosen, tests, rest)

    def _choose(self, own: dict[str, Any], split: str) -> Any:
        """Return one split, perhaps a part of it (`train[:1000]`). Raises ValueError where there is none."""
        if split in own:
            return own[split]
        if own and SPLIT_NAME.fullmatch(split):
            raise ValueError(f"{self.path} has no split {split}; it has: {', '.join(own)}")
        return self._load(split)

    def _load_all(self) -> dict[str, Any]:
        """Return every split by its name; a dataset that has no splits counts as the one to train on."""
        datasets = import_datasets()
        whole = self._load(None)
        return {self.split: whole} if isinstance(whole, datasets.Dataset) else dict(whole)

    def _load(self, split: str | None) -> Any:
        """Return a split, or all of them. Raises ValueError where it cannot be had."""
        datasets = import_datasets()
        path = Path(self.path).expanduser()
        try:
            if not path.is_dir():
                return datasets.load_dataset(self.path, self.subset, split=split, revision=self.revision)
            whole = datasets.load_from_disk(str(path))
        # What fails here is the network, the name, or the split: the package says which.
        except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.path} cannot be loaded: {reason}") from None
        if split is not None:
            raise ValueError(f"split={split}: of a folder a split is read as a whole; name one of: {', '.join(whole)}")
        return whole


@dataclass(frozen=True)
class HubSplits:
    """The loaded splits of a dataset: the one to train on first, then perhaps one to evaluate on.

    `tests` are those to test on, which nobody asked for; `rest` are the names of others, which are not read.
    """

    path: str
    chosen: dict[str, Any]
    tests: dict[str, Any]
    rest: list[str]

    def identify(self) -> dict[str, str]:
        """Return "SIZE HASH" of each chosen split by a name for a person."""
        return {f"{self.path}, {name}": _identify_split(dataset) for name, dataset in self.chosen.items()}

    def describe(self, held_out: Iterable[str], left_out: Iterable[str]) -> str:
        """Return which splits are read as what, where the dataset has more than one."""
        if len(self.chosen) + len(self.tests) + len(self.rest) == 1:
            return ""
        train, *evaluated = self.chosen
        said = [f"trains on its split {train}"]
        said += [f"evaluates on {name}" for name in evaluated]
        said += [f"{name} is never trained on" for name in held_out]
        if unread := [*left_out, *self.rest]:
            said.append(f"not read: {', '.join(unread)}")
        return "; " + ", ".join(said)


def import_datasets() -> Any:
    """Return the package. Raises ValueError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ValueError('needs a package: pip install -e ".[hub]"') from None
    # It tells of each try, twice; the error says enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return datasets


def read_hub_examples(
    chosen: HubDataset, inputs: str, label: str, pixels: InputFormat, form: TableFormat, eval_fraction: float
) -> Sources:
    """Return the labelled examples of one split, and of another one, or a part of it, to evaluate on.

    `inputs` and `label` are columns. Raises ValueError where they cannot be had, or are not what `form` says.
    """
    if inputs == label:
        raise ValueError(f"inputs={label} is the label as well; name another column")
    splits = chosen.load_splits([inputs, label])
    raw = [_read_column(dataset, label) for dataset in splits.chosen.values()]
    labels = prepare_labels(raw, form.num_classes, form.labels, form.ignore_label)
    made = [
        _make_source(dataset, f"{splits.path}, {name}", inputs, own, pixels)
        for (name, dataset), own in zip(splits.chosen.items(), labels.sides, strict=True)
    ]
    sides = (made[0], made[1]) if len(made) == 2 else split_source(made[0], eval_fraction)
    shape = made[0].take(np.array([0]))["inputs"].shape[1:] if len(made[0]) else (0,)
    if len(shape) + 1 not in DIMENSIONS[form.gives]:
        raise ValueError(f"an example is {shape}, which is no {form.gives}; set data.gives")
    selected = (list(splits.chosen), eval_fraction)
    sources = make_labelled_sources(sides, shape, labels, splits.identify(), selected, waits=True)
    held_out, may_ignore = {}, labels.may_ignore
    for name, dataset in splits.tests.items():
        own = _number_test_labels(raw, _read_column(dataset, label), labels)
        if own is not None:
            held_out[name] = _make_source(dataset, f"{splits.path}, {name}", inputs, own, pixels)
            may_ignore = may_ignore or holds_label(own, labels.ignore_label)
    left_out = [f"{name} (without labels, or with others)" for name in splits.tests if name not in held_out]
    names = _find_class_names(next(iter(splits.chosen.values())), label)
    return replace(
        sources,
        held_out=held_out,
        may_ignore=may_ignore,
        classes=names if len(names) == sources.num_outputs else sources.classes,
        summary=sources.summary + splits.describe(held_out, left_out),
    )


def _read_column(dataset: Any, column: str) -> np.ndarray:
    """Return one column as an array. The others are not looked at: one may hold images, which would be decoded."""
    alone = dataset.select_columns([column]).with_format("numpy")
    return np.asarray(alone[:][column] if len(dataset) else np.zeros(0, np.int64))


def _number_test_labels(raw: list[np.ndarray], test: np.ndarray, labels: Labels) -> np.ndarray | None:
    """Return the labels of a test set as those trained on are numbered; None where it has none, or other classes.

    Makers of a data set may keep the labels of its test set back: all are -1 then.
    """
    try:
        together = prepare_labels([*raw, test], ignore_label=labels.ignore_label)
    except ValueError:
        return None
    same = together.classes == labels.classes and together.num_outputs <= labels.num_outputs
    return together.sides[-1] if same and len(test) else None


def _find_class_names(dataset: Any, label: str) -> tuple[str, ...]:
    """Return the names of the classes, where the dataset knows them."""
    return tuple(getattr(dataset.features[label], "names", None) or ())


def read_hub_text(chosen: HubDataset, column: str, seq_len: int, eval_fraction: float) -> Sources:
    """Return a column of text as one long run of bytes, a line between rows.

    The split for evaluation is held out, or the end of the text where there is none. Raises ValueError where they
    cannot be had.
    """
    splits = chosen.load_splits([column])
    files = splits.identify()
    runs = [_join_rows(dataset, column) for dataset in splits.chosen.values()]
    if len(runs) == 1:
        runs = list(runs[0].cut(int(len(runs[0].content) * (1.0 - eval_fraction))))
    sources = make_byte_sources([runs[0]], [runs[1]], seq_len, hash_files(files, column, eval_fraction), files)
    held_out = {name: make_byte_windows(_join_rows(dataset, column), seq_len) for name, dataset in splits.tests.items()}
    return replace(sources, held_out=held_out, summary=sources.summary + splits.describe(held_out, []))


def _join_rows(dataset: Any, column: str) -> TextRun:
    return join_documents(str(text).encode() for text in dataset.select_columns([column])[column])


def _identify_split(dataset: Any) -> str:
    """Return "SIZE HASH" of the files that a split is mapped from, and of its number of rows."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # One that is in memory alone has no file; the package's own fingerprint is what it has.
    contents = [identify_file(file) for file in files] or [str(dataset._fingerprint)]  # noqa: SLF001
    size = sum(int(content.split()[0]) for content in contents) if files else 0
    return f"{size} {identify_bytes(' '.join([*contents, str(len(dataset))]).encode()).split()[1]}"


@dataclass(frozen=True)
class NumberRows:
    """Lists of numbers with a label, read where the dataset is mapped."""

    dataset: Any
    inputs: str
    label: np.ndarray
    gives: str

    def __len__(self) -> int:
        return len(self.label)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows at `indices`."""
        rows = np.asarray(indices)
        values = self.dataset[rows][self.inputs]
        return {"inputs": prepare_inputs(np.asarray(values), self.gives), "label": self.label[rows]}


def _make_source(dataset: Any, name: str, inputs: str, labels: np.ndarray, form: InputFormat) -> Source:
    """Return the rows of a split as a source of images or of numbers."""
    import datasets

    if isinstance(dataset.features[inputs], datasets.Image):
        rows = [f"{name}, row {row}" for row in range(len(dataset))]
        # The other columns are left out: one may hold images too, which would be decoded with each row.
        undecoded = dataset.select_columns([inputs]).cast_column(inputs, datasets.Image(decode=False))
        return EncodedImages(rows, labels, _read_encoded_from(undecoded, inputs), form.size, form.channels)
    return NumberRows(dataset.with_format("numpy", columns=[inputs]), inputs, labels, form.gives)


def _read_encoded_from(dataset: Any, column: str) -> Callable[[int], bytes]:
    def read(row: int) -> bytes:
        value = dataset[row][column]
        if value is None:
            raise UndecodableError(f"row {row} has no image")
        # An image is in the dataset itself, or in a file that it names.
        return value["bytes"] if value["bytes"] is not None else _read_file(value["path"])

    return read


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}; bring it back") from None
