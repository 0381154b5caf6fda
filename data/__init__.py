"""The data there is: option, default and range of each. Free of jax and grain, so a wrong command is answered at once.

A data option says what it gives (`tokens`, `features` or `images`); `sources()` reads it and returns the training and
the evaluation source. One that reads a user's files has `check_readable()`, which finds what is wrong with them without
reading much. Here is what every machine has, and a user's own code; a user's own files are in user_formats.py.

To add one: a dataclass (also in the union `Data`), a function that reads it, a YAML in conf/data/. A user's own code
needs none of that: it is named by `target`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from annotated_types import Ge

from data.chat_options import Chat, Preferences
from data.option_fields import BatchOptions, Count, Fraction, ImageOptions, WholeNumber
from data.user_formats import Arrayrecord, Arrays, Csv, Hub, Images, Parquet, Text, Tokens

if TYPE_CHECKING:
    from data.sources import Sources


@runtime_checkable
class CheckableData(Protocol):
    """An option whose data may be missing."""

    def check_readable(self) -> None:
        """Raise ValueError, which begins with a key of the option, where the data cannot be what it should be."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stdlib(BatchOptions):
    """The source of Python's standard library, as bytes. Real text that is already on the machine.

    Attributes:
        seq_len: tokens in an example.
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the files that are held out for evaluation.
    """

    kind: Literal["stdlib"] = "stdlib"
    seq_len: Count = 128
    batch_size: Count = 16
    eval_fraction: Fraction = 0.05

    gives: ClassVar[str] = "tokens"

    def sources(self) -> Sources:
        """Return the training and the evaluation source."""
        from data.text_files import read_stdlib

        return read_stdlib(self.seq_len, self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Digits(ImageOptions):
    """scikit-learn's real handwritten digits: 1,797 images of 8 × 8 × 1 pixels in 10 classes.

    Attributes:
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the images that are held out for evaluation.
    """

    kind: Literal["digits"] = "digits"
    batch_size: Count = 64
    eval_fraction: Fraction = 0.2

    gives: ClassVar[str] = "images"

    def sources(self) -> Sources:
        """Return the training and the evaluation source."""
        from data.built_in import read_digits

        return read_digits(self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Synthetic(ImageOptions):
    """Random examples made on the spot, the same on every machine. For benchmarks.

    Attributes:
        gives: what an example is; `features` and `images` are labelled, so that there is something to learn.
        size: how many there are.
        seq_len: tokens in an example, where it is tokens.
        num_features: numbers in an example, where it is features.
        image_size: side of an example in pixels, where it is an image.
        batch_size: examples in a step, on all devices together.
        delay_seconds: each batch takes that much longer, as from slow storage.
    """

    kind: Literal["synthetic"] = "synthetic"
    gives: Literal["tokens", "features", "images"] = "tokens"
    size: Count = 4096
    seq_len: Count = 128
    num_features: Count = 64
    image_size: Count = 32
    batch_size: Count = 16
    delay_seconds: Annotated[float, Ge(0.0)] = 0.0

    def sources(self) -> Sources:
        """Return the training and the evaluation source."""
        from data import built_in

        if self.gives == "tokens":
            made = built_in.make_random_tokens(self.size, self.seq_len)
        elif self.gives == "images":
            made = built_in.make_random_images(self.size, self.image_size)
        else:
            made = built_in.make_random_features(self.size, self.num_features)
        return built_in.delay_batches(made, self.delay_seconds)


@dataclass(frozen=True, kw_only=True)
class ExternalData(BatchOptions):
    """Data of your own, from a function in a file of the current directory or in an installed package.

    The target is called as

        target(**options) -> dict[str, np.ndarray]

    The arrays have a row per example: "inputs" (features, or images of height × width × channels) and mostly a "label",
    or "tokens" (each row one longer than what the model sees), and whatever else your objective reads; the same at each
    call, for a run does not go on with other data. A fixed share is put aside for evaluation. What is no array, or too
    large, comes as data.sources.Sources, which says all by itself.

    Attributes:
        target: `module:function`.
        options: what it is called with by name, as in `+data.options.size=1000`.
        ignore_label: a label of this value is no class, and counts in no loss and no metric; of tokens one that the
            model sees, but need not foretell. An objective of your own gets labels as they are.
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the rows that are held out for evaluation.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    ignore_label: WholeNumber = -100
    batch_size: Count = 64
    eval_fraction: Fraction = 0.1

    # Not known before it is read.
    gives: ClassVar[str] = ""

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises InvalidUserData where the target returns neither."""
        from data.user_data import read_user_data

        return read_user_data(self.target, self.options, self.eval_fraction, self.ignore_label)


@dataclass(frozen=True, kw_only=True)
class NoData:
    """No data: for a program of your own that makes what it learns from, as an agent in an environment does.

    Its batch is None.
    """

    kind: Literal["none"] = "none"

    gives: ClassVar[str] = ""
    batch_size: ClassVar[int] = 1

    def sources(self) -> Sources:
        """Return sources of one example, which is nothing but its number."""
        from data.built_in import make_no_examples

        return make_no_examples()


Data = (
    Stdlib
    | Text
    | Digits
    | Synthetic
    | Tokens
    | Arrays
    | Images
    | Parquet
    | Csv
    | Arrayrecord
    | Hub
    | Chat
    | Preferences
    | ExternalData
    | NoData
)
