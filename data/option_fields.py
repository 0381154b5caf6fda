"""What several data options have in common: ranges, how batches are prepared, how images are varied. Free of jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Interval

Count = Annotated[int, Ge(1)]
Number = Annotated[int, Ge(0)]
Fraction = Annotated[float, Interval(gt=0.0, lt=1.0)]
Share = Annotated[float, Interval(ge=0.0, le=1.0)]
Strength = Annotated[float, Ge(0.0)]


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
        gives: `images` (height × width × channels) or `features` (a vector).
    """

    path: str
    batch_size: Count = 64
    eval_fraction: Fraction = 0.1
    num_classes: Count | None = None

    gives: Literal["images", "features"] = "images"


def check_path_exists(path: str) -> Path:
    """Return the path that a user gave, `~` expanded. Raises ValueError where nothing is there."""
    found = Path(path).expanduser()
    if not found.exists():
        raise ValueError(f"path={path} does not exist")
    return found
