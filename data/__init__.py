"""The data there is: option, default and range of each. Free of jax and grain, so a wrong command is answered at once.

A data option says what it gives (`tokens`, `features` or `images`); `sources()` reads it and returns the training and
the evaluation source. To add one: a dataclass here, a function in sources.py, a YAML in conf/data/. A user's own needs
none of that: it is named by `target`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Interval

if TYPE_CHECKING:
    from data.sources import Sources

Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Interval(gt=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True)
class Stdlib:
    """The source of Python's standard library, as bytes. Real text that is already on the machine."""

    kind: Literal["stdlib"] = "stdlib"
    seq_len: Count = 128
    batch_size: Count = 16
    eval_fraction: Fraction = 0.05

    gives: ClassVar[str] = "tokens"

    def sources(self) -> Sources:
        from data.sources import stdlib

        return stdlib(self.seq_len, self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text file or a folder of the user's, as bytes; split by file, or by position where the files are few."""

    kind: Literal["text"] = "text"
    path: str
    pattern: str = "**/*.txt"
    seq_len: Count = 128
    batch_size: Count = 16
    eval_fraction: Fraction = 0.05

    gives: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise ValueError(f"path={self.path} does not exist")
        if path.is_dir() and not any(path.glob(self.pattern)):
            raise ValueError(f"path={self.path} holds no file that matches pattern={self.pattern}")

    def sources(self) -> Sources:
        from data.sources import text

        return text(Path(self.path).expanduser(), self.pattern, self.seq_len, self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's real handwritten digits: 1,797 images of 8 × 8 × 1 pixels in 10 classes."""

    kind: Literal["digits"] = "digits"
    batch_size: Count = 64
    eval_fraction: Fraction = 0.2

    gives: ClassVar[str] = "images"

    def sources(self) -> Sources:
        from data.sources import digits

        return digits(self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Random examples made on the spot, the same on every machine. For benchmarks.

    `delay_seconds`: each batch takes that much longer, as from slow storage.
    """

    kind: Literal["synthetic"] = "synthetic"
    gives: Literal["tokens", "features"] = "tokens"
    size: Count = 4096
    seq_len: Count = 128
    num_features: Count = 64
    batch_size: Count = 16
    delay_seconds: Annotated[float, Ge(0.0)] = 0.0

    def sources(self) -> Sources:
        from data.sources import slowed, synthetic_features, synthetic_tokens

        if self.gives == "tokens":
            return slowed(synthetic_tokens(self.size, self.seq_len), self.delay_seconds)
        return slowed(synthetic_features(self.size, self.num_features), self.delay_seconds)


@dataclass(frozen=True, kw_only=True)
class External:
    """Data of your own. `target` is `module:function`, in a file of the current directory or in an installed package.

        target(**options) -> dict[str, np.ndarray]

    The arrays have a row per example: "inputs" (features, or images of height × width × channels) and mostly a "label",
    or "tokens" (each row one longer than what the model sees), and whatever else your objective reads. A fixed share is
    put aside for evaluation. What is no array, or too large, comes as data.sources.Sources, which says all by itself.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: Count = 64
    eval_fraction: Fraction = 0.1

    gives: ClassVar[str] = ""  # known when it is read

    def sources(self) -> Sources:
        """Raises Unfit where the target returns something else."""
        from data.external import sources

        return sources(self.target, self.options, self.eval_fraction)


class Unfit(TypeError):
    """What a user's own data returned is not what is asked of it."""


Data = Stdlib | Text | Digits | Synthetic | External
