"""What several data options have in common: ranges, how batches are prepared, how images are varied. Free of jax."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval

Count = Annotated[int, Ge(1)]
Number = Annotated[int, Ge(0)]
Fraction = Annotated[float, Interval(gt=0.0, lt=1.0)]
Share = Annotated[float, Interval(ge=0.0, le=1.0)]
Strength = Annotated[float, Ge(0.0)]
# A label to leave out is a whole number of 32 bits, as labels are on a device.
WholeNumber = Annotated[int, Interval(ge=-(2**31), le=2**31 - 1)]


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How batches are prepared. None of it changes a batch, so a run may go on with other values.

    Attributes:
        workers: so many processes make batches; 0: the training process does.
        prefetch: so many batches are made ahead, by each worker, or by threads where there is no worker.
    """

    workers: Number = 0
    prefetch: Number = 0


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied; what is 0 or false is off. Evaluation images stay as they are.

    Attributes:
        crop: pixels of black border to cut a random window from.
        flip: left and right, every second image.
        erase: share of the images that lose a random square of a quarter of their area.
        brightness: standard deviation of what is added to an image.
        noise: standard deviation of what is added to each value of it.
    """

    crop: Number = 0
    flip: bool = False
    erase: Share = 0.0
    brightness: Strength = 0.0
    noise: Strength = 0.0


@dataclass(frozen=True, kw_only=True)
class ImageOptions(BatchOptions):
    """An option that may give images, which are then varied in training."""

    augment: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        # A field where the user chooses, a constant of the class where there is no choice.
        gives = getattr(self, "gives", "images")
        if gives != "images" and self.augment != Augmentation():
            raise ValueError(f"augment varies images, but these are {gives}; leave data.augment out")


@dataclass(frozen=True, kw_only=True)
class LabelledFileOptions(ImageOptions):
    """Inputs with a label each, from a file or folder of the user's.

    Attributes:
        path: where they are.
        batch_size: examples in a step, on all devices together.
        eval_fraction: share of the examples that are held out for evaluation, where the files have none.
        num_classes: null: as many as the largest label says.
        gives: `images` (height × width × channels), `features` (a vector) or `ids` (whole numbers, for an embedding).
        ignore_label: a label of this value is no class, and counts in no loss and no metric.
    """

    path: str
    batch_size: Count = 64
    eval_fraction: Fraction = 0.1
    num_classes: Count | None = None
    # As IGNORED_LABEL of sources.py, which needs numpy.
    ignore_label: WholeNumber = -100

    gives: Literal["images", "features", "ids"] = "images"


@dataclass(frozen=True, kw_only=True)
class TableOptions(LabelledFileOptions):
    """Inputs and labels that are in columns or arrays, and read into memory.

    Attributes:
        labels: `classes` or `numbers` (to regress on); null: whole numbers, names, true and false are classes, other
            numbers are numbers.
    """

    labels: Literal["classes", "numbers"] | None = None


@dataclass(frozen=True, kw_only=True)
class ArrayNames:
    """Names of the arrays of an archive, where they are none that people mostly use.

    Attributes:
        inputs: the inputs to train on.
        label: their labels.
        eval_inputs: the inputs to evaluate on; null: a fixed part of the others.
        eval_label: their labels.
        test_inputs: inputs that are never trained on, for evaluations of the split `test`.
        test_label: their labels.
    """

    inputs: str = "inputs"
    label: str = "label"
    eval_inputs: str | None = None
    eval_label: str | None = None
    test_inputs: str | None = None
    test_label: str | None = None

    def __post_init__(self) -> None:
        for part in ("eval", "test"):
            given = {name: getattr(self, f"{part}_{name}") for name in ("inputs", "label")}
            if len(lacking := [name for name, value in given.items() if value is None]) == 1:
                raise ValueError(f"{part}_{lacking[0]}: a value is needed, inputs and label go together")


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """Which columns of a table are inputs and label: another way to say `data.inputs` and `data.label`.

    Attributes:
        inputs: a column, or several.
        label: the column of labels.
    """

    inputs: str | tuple[str, ...] | None = None
    label: str | None = None


def explain_missing_name(name: str, names: Iterable[str]) -> str:
    """Return what there is where a name is not: the one that was meant, or all of them."""
    listed = list(names)
    if near := difflib.get_close_matches(name, listed, 1, 0.6):
        return f"; did you mean {near[0]}?"
    shown = ", ".join(listed[:20]) + (f" and {len(listed) - 20:,} more" if len(listed) > 20 else "")
    return f"; it has: {shown or 'none'}"


def check_path_exists(path: str) -> Path:
    """Return the path that a user gave, `~` expanded. Raises ValueError where nothing is there."""
    found = Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"path={path} does not exist")
    return found
