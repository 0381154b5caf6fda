"""Data options that read files of the user's: text, tokens, arrays, folders of images, tables, records, the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    WholeNumber,
    check_path_exists,
)

if TYPE_CHECKING:
    from data.sources import Sources

# So many files of text are looked into before jax starts.
CHECKED_FILES = 8


def check_eval_path(path: str) -> Path:
    """Return the path of what to evaluate on, `~` expanded. Raises ValueError where nothing is there."""
    try:
        return check_path_exists(path)
    except ValueError as error:
        raise ValueError(f"eval_{error}") from None


@dataclass(frozen=True, kw_only=True)
class Text(BatchOptions):
    """A text file or a folder of the user's, as bytes; split by file, or by position where the files are few.

    Files that are called parts of a data set, such as `wiki.train.txt` and `valid/a.txt`, are these parts; those of
    `test` are never trained on. What is compressed (gz, bz2, xz, zst) is unpacked. Of JSON, a line an object or one
    list of objects, a field is read.

    Attributes:
        path: a file, or a folder of them.
        eval_path: another file or folder to evaluate on; null: a part of `path`.
        pattern: which files of a folder.
        field: which field of JSON is the text; null: `text`, in files whose name says that they are JSON.
        tokenizer: a folder with tokenizer.json, or such a file: what makes tokens of text. null: that of `model=hf`,
            and elsewhere a token is a byte; bytes: always that.
        eos: whether the tokenizer's token for that ends each document (a file, an object of JSON) but the last.
        seq_len: tokens in an example.
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the text that is held out for evaluation, where the data has no part for that.
    """

    kind: Literal["text"] = "text"
    path: str
    eval_path: str | None = None
    pattern: str = "**/*.txt"
    field: str | None = None
    tokenizer: str | None = None
    eos: bool = True
    seq_len: Count = 128
    batch_size: Count = 16
    eval_fraction: Fraction = 0.05

    gives: ClassVar[str] = "tokens"

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.documents import check_text_file, find_text_files, group_text_files

        path = check_path_exists(self.path)
        files, _ = find_text_files(path, self.pattern)
        group_text_files(files, path)
        if self.eval_path is not None:
            files += find_text_files(check_eval_path(self.eval_path), self.pattern)[0]
        # A few, for there may be a million; all of them are read before training.
        for file in [*files[:CHECKED_FILES], files[-1]]:
            check_text_file(file, self.field)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.text_files import TextPlace, read_text
        from data.text_tokenizer import encode_sources

        eval_path = None if self.eval_path is None else Path(self.eval_path).expanduser()
        place = TextPlace(Path(self.path).expanduser(), self.pattern, self.field, eval_path)
        return encode_sources(read_text(place, self.seq_len, self.eval_fraction), self.tokenizer, ends=self.eos)

    def list_earlier(self) -> tuple[Text, ...]:
        """Return the options that give what this one did earlier: once no token ended a document."""
        return (replace(self, eos=False),) if self.eos and self.tokenizer not in (None, "bytes") else ()


@dataclass(frozen=True, kw_only=True)
class Tokens(BatchOptions):
    """Tokens that `python -m runner tokenize` has written, mapped from disk; or `train.bin` and `val.bin` of others.

    Attributes:
        path: the folder it has written, or one with the .bin files of nanoGPT (uint16) or llm.c.
        encoding: refuse any other one, such as `tiktoken:gpt2`; null: take what is there.
        vocab_size: how many tokens there may be, for files that do not say it; null: as many as the largest one says.
        ignore_label: a token, such as that of padding, that the model sees, but that counts in no loss and no metric.
        seq_len: tokens in an example.
        batch_size: examples in a step, on all devices together.
    """

    kind: Literal["tokens"] = "tokens"
    path: str
    encoding: str | None = None
    vocab_size: Count | None = None
    ignore_label: WholeNumber = -100
    seq_len: Count = 128
    batch_size: Count = 16

    gives: ClassVar[str] = "tokens"

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.raw_tokens import choose_token_format

        choose_token_format(check_path_exists(self.path), self.encoding, self.vocab_size)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.label_checks import ignore_token
        from data.raw_tokens import choose_token_format, read_raw_tokens
        from data.token_files import read_tokens

        path = Path(self.path).expanduser()
        raw = choose_token_format(path, self.encoding, self.vocab_size)
        if raw is not None:
            return ignore_token(read_raw_tokens(path, raw, self.vocab_size, self.seq_len), self.ignore_label)
        return ignore_token(read_tokens(path, self.encoding, self.seq_len), self.ignore_label)


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
        from data.npz_files import read_npz_shapes

        read_npz_shapes(check_path_exists(self.path), self.gives, self.columns)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.npz_files import read_npz
        from data.tables import TableFormat

        form = TableFormat(self.gives, self.num_classes, self.labels, self.ignore_label)
        return read_npz(Path(self.path).expanduser(), form, self.eval_fraction, self.columns)


@dataclass(frozen=True, kw_only=True)
class Images(ImageOptions):
    """A folder with a folder of image files for each class; split by file. Decoded when needed, then kept.

    Where it holds the parts of a data set, `train/CLASS`, `val/CLASS` and `test/CLASS`, these are used: what is to
    test on is never trained on.

    Attributes:
        path: the folder of folders.
        eval_path: another folder with the same classes to evaluate on; null: `val` beside `train`, or a part.
        size: side in pixels that images are scaled and cut to.
        channels: 1 makes them grey.
        on_bad: what is done about an image that cannot be decoded: the run ends and says which it is (`raise`), or
            another one takes its place, now and after a restart (`skip`).
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the files that are held out for evaluation, where no part of the data is for that.
    """

    kind: Literal["images"] = "images"
    path: str
    eval_path: str | None = None
    size: Count = 32
    channels: Literal[1, 3] = 3
    on_bad: Literal["raise", "skip"] = "raise"
    batch_size: Count = 64
    eval_fraction: Fraction = 0.1

    gives: ClassVar[str] = "images"

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.image_folders import find_image_layout

        eval_path = None if self.eval_path is None else check_eval_path(self.eval_path)
        find_image_layout(check_path_exists(self.path), eval_path)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.bad_examples import skip_bad_examples
        from data.image_folders import ImageForm, find_image_layout, read_image_folder

        eval_path = None if self.eval_path is None else Path(self.eval_path).expanduser()
        layout = find_image_layout(Path(self.path).expanduser(), eval_path)
        form = ImageForm(self.size, self.channels, self.on_bad)
        return skip_bad_examples(read_image_folder(layout, form, self.eval_fraction), self.on_bad)


@dataclass(frozen=True, kw_only=True)
class Parquet(TableOptions):
    """A Parquet file, or a folder of them; the named columns are read into memory. Needs pyarrow.

    Files that are called `train-…`, `validation-…` and `test-…` are these parts; else a fixed part is held out.

    Attributes:
        gives: `images` (height × width × channels), `features` (a vector), `ids` (whole numbers, for an embedding), or
            `tokens`: the column `inputs` is text, which is read byte by byte.
        inputs: a column of lists, or of encoded images, or of text; or several columns of numbers.
        label: the column of labels: numbers, or names of classes.
        columns: both at once, as in `{inputs: [a, b], label: y}`.
        size: side in pixels that encoded images are scaled and cut to.
        channels: of encoded images; 1 makes them grey.
        on_bad: what is done about an image that cannot be decoded: the run ends and says which it is (`raise`), or
            another one takes its place, now and after a restart (`skip`).
        seq_len: tokens in an example, where it is text; null: 128.
    """

    kind: Literal["parquet"] = "parquet"
    inputs: str | tuple[str, ...] = "inputs"
    label: str = "label"
    gives: Literal["images", "features", "ids", "tokens"] = "images"  # type: ignore[assignment]
    columns: ColumnNames | None = None
    size: Count = 32
    channels: Literal[1, 3] = 3
    on_bad: Literal["raise", "skip"] = "raise"
    seq_len: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gives == "tokens" and not isinstance(self.names[0], str):
            raise ValueError("inputs: text is one column; name it alone, as in data.inputs=text")
        if self.gives != "tokens" and self.seq_len is not None:
            raise ValueError(f"seq_len is of text, but gives={self.gives}; leave it out, or say data.gives=tokens")

    @property
    def names(self) -> tuple[str | tuple[str, ...], str]:
        """Return the columns of inputs and that of labels, however they are said."""
        given = self.columns or ColumnNames()
        return given.inputs or self.inputs, given.label or self.label

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.parquet import find_parquet_files

        inputs, label = self.names
        find_parquet_files(check_path_exists(self.path), inputs, None if self.gives == "tokens" else label)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.label_checks import ignore_token
        from data.parquet import read_parquet, read_parquet_text
        from data.tables import InputFormat, TableFormat

        if self.gives == "tokens":
            (column, _), seq_len = self.names, self.seq_len or 128
            assert isinstance(column, str)
            made = read_parquet_text(Path(self.path).expanduser(), column, seq_len, self.eval_fraction)
            return ignore_token(made, self.ignore_label)
        pixels = InputFormat(self.gives, self.size, self.channels, self.on_bad)
        form = TableFormat(self.gives, self.num_classes, self.labels, self.ignore_label)
        return read_parquet(Path(self.path).expanduser(), *self.names, pixels, form, self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Csv(BatchOptions):
    """A CSV file, or a folder of them, with a line of names: columns of numbers and a label. Needs pyarrow.

    Files that are called `train`, `validation` and `test` are these parts; else a fixed part is held out. What is
    compressed (gz, bz2, xz, zst) is unpacked.

    Attributes:
        path: a file, or a folder of them.
        inputs: a column of numbers, or several; null: all columns of numbers other than the label.
        label: the column of labels: numbers, or names of classes.
        columns: both at once, as in `{inputs: [a, b], label: y}`.
        delimiter: what stands between columns, `tab` for a tabulator; null: whichever of `,` `;` `|` and tab it is.
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the rows that are held out for evaluation, where the files have no part for that.
        num_classes: null: as many as the largest label says.
        labels: `classes` or `numbers` (to regress on); null: whole numbers, names, true and false are classes, other
            numbers are numbers.
        ignore_label: a label of this value is no class, and counts in no loss and no metric.
        gives: `features` (a vector) or `ids` (whole numbers, for an embedding).
    """

    kind: Literal["csv"] = "csv"
    path: str
    inputs: str | tuple[str, ...] | None = None
    label: str = "label"
    columns: ColumnNames | None = None
    delimiter: str | None = None
    batch_size: Count = 64
    eval_fraction: Fraction = 0.1
    num_classes: Count | None = None
    labels: Literal["classes", "numbers"] | None = None
    ignore_label: WholeNumber = -100
    gives: Literal["features", "ids"] = "features"

    def __post_init__(self) -> None:
        if self.delimiter is not None and len(self.separator or "") != 1:
            raise ValueError(f"delimiter: got {self.delimiter!r}; expected one character, or tab")

    @property
    def separator(self) -> str | None:
        """Return the delimiter as it is in the file; None where it is to be found out."""
        # A shell hands on a backslash and a letter where a tabulator is meant.
        return "\t" if self.delimiter in ("tab", "\\t") else self.delimiter

    @property
    def names(self) -> tuple[str | tuple[str, ...] | None, str]:
        """Return the columns of inputs and that of labels, however they are said."""
        given = self.columns or ColumnNames()
        return given.inputs or self.inputs, given.label or self.label

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.csv_files import find_csv_files

        find_csv_files(check_path_exists(self.path), *self.names, self.separator)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.csv_files import read_csv
        from data.tables import TableFormat

        form = TableFormat(self.gives, self.num_classes, self.labels, self.ignore_label)
        return read_csv(Path(self.path).expanduser(), *self.names, self.separator, form, self.eval_fraction)


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

        path = Path(self.path).expanduser()
        return read_array_records(path, self.gives, self.eval_fraction, self.num_classes, self.ignore_label)


@dataclass(frozen=True, kw_only=True)
class Hub(LabelledFileOptions):
    """A dataset of the Hugging Face hub, or one that `save_to_disk` left in a folder. Needs the extra `hub`.

    Attributes:
        gives: `tokens` reads the column `inputs` as text, byte by byte or with `tokenizer`.
        subset: of the dataset, where it has several.
        revision: a commit or a tag of it; null: the newest.
        split: what to train on.
        eval_split: what to evaluate on; null: the dataset's own split for that, or else a part of `split`; none: a part
            of `split` whatever there is. A split to test on is never trained on.
        inputs: the column of inputs.
        label: the column of labels.
        size: side in pixels that images are scaled and cut to.
        channels: of images; 1 makes them grey.
        on_bad: what is done about an image that cannot be decoded: the run ends and says which it is (`raise`), or
            another one takes its place, now and after a restart (`skip`).
        tokenizer: of text, as of `data=text`.
        eos: as of `data=text`; a row is a document.
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
    on_bad: Literal["raise", "skip"] = "raise"
    tokenizer: str | None = None
    eos: bool = True
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
        from data.bad_examples import skip_bad_examples
        from data.hub import HubDataset, read_hub_examples, read_hub_text
        from data.label_checks import ignore_token
        from data.tables import InputFormat, TableFormat
        from data.text_tokenizer import encode_sources

        chosen = HubDataset(self.path, self.subset, self.revision, self.split, self.eval_split)
        if self.gives == "tokens":
            made = read_hub_text(chosen, self.inputs, self.seq_len, self.eval_fraction)
            return ignore_token(encode_sources(made, self.tokenizer, ends=self.eos), self.ignore_label)
        pixels = InputFormat(self.gives, self.size, self.channels)
        form = TableFormat(self.gives, self.num_classes, None, self.ignore_label)
        made = read_hub_examples(chosen, self.inputs, self.label, pixels, form, self.eval_fraction)
        return skip_bad_examples(made, self.on_bad)

    def list_earlier(self) -> tuple[Hub, ...]:
        """Return the options that give what this one did earlier.

        Once no token ended a document, and once no split for evaluation was looked for.
        """
        plain = replace(self, eos=False) if self.tokenizer not in (None, "bytes") else self
        both = (plain, plain if self.eval_split is not None else replace(plain, eval_split="none"))
        return tuple(option for option in dict.fromkeys(both) if option != self)
