"""Data options that read files of the user's: text, tokens, arrays, folders of images, tables, records, the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from data.option_fields import (
    ArrayNames,
    BatchOptions,
    ColumnNames,
    Count,
    Fraction,
    ImageOptions,
    LabelledFileOptions,
    Number,
    TableOptions,
    check_path_exists,
)

if TYPE_CHECKING:
    from data.sources import Sources


@dataclass(frozen=True, kw_only=True)
class Text(BatchOptions):
    """A text file or a folder of the user's, as bytes; split by file, or by position where the files are few.

    Attributes:
        path: a file, or a folder of them.
        pattern: which files of a folder.
        seq_len: tokens in an example; a token is a byte.
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the text that is held out for evaluation.
    """

    kind: Literal["text"] = "text"
    path: str
    pattern: str = "**/*.txt"
    seq_len: Count = 128
    batch_size: Count = 16
    eval_fraction: Fraction = 0.05

    gives: ClassVar[str] = "tokens"

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        path = check_path_exists(self.path)
        if path.is_dir() and not any(path.glob(self.pattern)):
            raise ValueError(f"path={self.path} holds no file that matches pattern={self.pattern}")

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.text_files import read_text

        return read_text(Path(self.path).expanduser(), self.pattern, self.seq_len, self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Tokens(BatchOptions):
    """Tokens that `python -m runner tokenize` has written, mapped from disk.

    Attributes:
        path: the folder it has written.
        encoding: refuse any other one, such as `tiktoken:gpt2`; null: take what is there.
        seq_len: tokens in an example.
        batch_size: examples in a step, on all devices together.
    """

    kind: Literal["tokens"] = "tokens"
    path: str
    encoding: str | None = None
    seq_len: Count = 128
    batch_size: Count = 16

    gives: ClassVar[str] = "tokens"

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.token_files import read_token_header

        check_path_exists(self.path)
        read_token_header(Path(self.path).expanduser(), self.encoding)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.token_files import read_tokens

        return read_tokens(Path(self.path).expanduser(), self.encoding, self.seq_len)


@dataclass(frozen=True, kw_only=True)
class Arrays(TableOptions):
    """An .npz with `inputs` and `label`, and perhaps `eval_inputs` and `eval_label`; else a fixed part is held out.

    Names such as `x_train`, `y_train`, `x_test` and `y_test`, or `train_images` and `train_labels`, are known as well.

    Attributes:
        columns: how the arrays are called, as in `{inputs: pixels, label: digit}`; null: by a name that is known.
    """

    kind: Literal["arrays"] = "arrays"
    columns: ArrayNames | None = None

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.tables import read_npz_shapes

        read_npz_shapes(check_path_exists(self.path), self.gives, self.columns)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.tables import TableFormat, read_npz

        form = TableFormat(self.gives, self.num_classes, self.labels)
        return read_npz(Path(self.path).expanduser(), form, self.eval_fraction, self.columns)


@dataclass(frozen=True, kw_only=True)
class Images(ImageOptions):
    """A folder with a folder of PNG or JPEG files for each class; split by file. Decoded when needed, then kept.

    Attributes:
        path: the folder of folders.
        size: side in pixels that images are scaled and cut to.
        channels: 1 makes them grey.
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the files that are held out for evaluation.
    """

    kind: Literal["images"] = "images"
    path: str
    size: Count = 32
    channels: Literal[1, 3] = 3
    batch_size: Count = 64
    eval_fraction: Fraction = 0.1

    gives: ClassVar[str] = "images"

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.images import list_classes

        list_classes(check_path_exists(self.path))

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.images import read_image_folder

        return read_image_folder(Path(self.path).expanduser(), self.size, self.channels, self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Parquet(TableOptions):
    """A Parquet file, or a folder of them; the named columns are read into memory. Needs pyarrow.

    Files that are called `train-…`, `validation-…` and `test-…` are these parts; else a fixed part is held out.

    Attributes:
        inputs: a column of lists, or of encoded images; or several columns of numbers.
        label: the column of labels: numbers, or names of classes.
        columns: both at once, as in `{inputs: [a, b], label: y}`.
        size: side in pixels that encoded images are scaled and cut to.
        channels: of encoded images; 1 makes them grey.
    """

    kind: Literal["parquet"] = "parquet"
    inputs: str | tuple[str, ...] = "inputs"
    label: str = "label"
    columns: ColumnNames | None = None
    size: Count = 32
    channels: Literal[1, 3] = 3

    @property
    def names(self) -> tuple[str | tuple[str, ...], str]:
        """Return the columns of inputs and that of labels, however they are said."""
        given = self.columns or ColumnNames()
        return given.inputs or self.inputs, given.label or self.label

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.parquet import find_parquet_files

        find_parquet_files(check_path_exists(self.path), *self.names)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.parquet import read_parquet
        from data.tables import InputFormat, TableFormat

        pixels = InputFormat(self.gives, self.size, self.channels)
        form = TableFormat(self.gives, self.num_classes, self.labels)
        return read_parquet(Path(self.path).expanduser(), *self.names, pixels, form, self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Arrayrecord(LabelledFileOptions):
    """ArrayRecord files, read through grain where they lie. Each record is an .npz with `inputs` and `label`.

    Attributes:
        prefetch: so many batches are made ahead. Not 0, as elsewhere: every batch is read from disk.
    """

    kind: Literal["arrayrecord"] = "arrayrecord"
    # Not 0, as elsewhere: every batch is read from disk.
    prefetch: Number = 4

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.records import find_record_files

        find_record_files(check_path_exists(self.path))

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.records import read_array_records

        return read_array_records(Path(self.path).expanduser(), self.gives, self.eval_fraction, self.num_classes)


@dataclass(frozen=True, kw_only=True)
class Hub(LabelledFileOptions):
    """A dataset of the Hugging Face hub, or one that `save_to_disk` left in a folder. Needs the extra `hub`.

    Attributes:
        gives: `tokens` reads the column `inputs` as text, byte by byte.
        subset: of the dataset, where it has several.
        revision: a commit or a tag of it; null: the newest.
        split: what to train on.
        eval_split: what to evaluate on; null: a part of `split` is held out.
        inputs: the column of inputs.
        label: the column of labels.
        size: side in pixels that images are scaled and cut to.
        channels: of images; 1 makes them grey.
        seq_len: tokens in an example, where it is text.
        prefetch: so many batches are made ahead.
    """

    kind: Literal["hub"] = "hub"
    gives: Literal["images", "features", "tokens"] = "images"  # type: ignore[assignment]
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    eval_split: str | None = None
    inputs: str = "image"
    label: str = "label"
    size: Count = 32
    channels: Literal[1, 3] = 3
    seq_len: Count = 128
    prefetch: Number = 4

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        # A name is not looked up on the hub: that would need the network for a command that may be wrong elsewhere.
        path = Path(self.path).expanduser()
        if path.is_dir() and not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise ValueError(
                f"path={self.path} is a folder that save_to_disk did not write; name a dataset or write it"
            )

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.hub import HubDataset, read_hub_examples, read_hub_text
        from data.tables import InputFormat

        chosen = HubDataset(self.path, self.subset, self.revision, self.split, self.eval_split)
        if self.gives == "tokens":
            return read_hub_text(chosen, self.inputs, self.seq_len, self.eval_fraction)
        form = InputFormat(self.gives, self.size, self.channels)
        return read_hub_examples(chosen, self.inputs, self.label, form, self.eval_fraction, self.num_classes)
