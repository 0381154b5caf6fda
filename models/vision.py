"""The models there are for images; the other half of the catalogue is models/__init__.py. Free of jax.

`build` raises ValueError where images of a shape do not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval

from models.choices import Count, Counts, Implementation, Positive, Rate, check_head_size

if TYPE_CHECKING:
    from flax import nnx


@dataclass(frozen=True, kw_only=True)
class Cnn:
    """A small convolutional network over images: stages of two convolutions and a pooling, each half as wide and high.

    Choose it as the first thing to try on images. `widths`: channels of each stage.
    """

    kind: Literal["cnn"] = "cnn"
    widths: Counts = (32, 64)
    hidden: Count = 128
    dropout: Rate = 0.3

    takes: ClassVar[tuple[str, ...]] = ("images",)
    scopes: ClassVar[tuple[str, ...]] = ("block",)
    tags: ClassVar[tuple[str, ...]] = ("first", "second")
    objective: ClassVar[str] = "classify"
    shows: ClassVar[tuple[str, ...]] = ()

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model from images of (height, width, channels) to `num_outputs` classes."""
        if min(inputs[:2]) < 2 ** len(self.widths):
            raise ValueError(
                f"{len(self.widths)} stages halve an image as often, and {_sides(inputs)} pixels are too few; choose "
                "fewer model.widths"
            )
        from models.cnn import CNN

        return CNN(self, image=inputs, num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Resnet:
    """A residual network with batch normalization over images. Choose it for accuracy without much data.

    `stages`: basic blocks in each stage; `width`: channels of the first, each further one has twice as many and half
    the resolution. `stem`: `small` keeps the resolution, `imagenet` quarters it first.
    """

    kind: Literal["resnet"] = "resnet"
    stages: Counts = (2, 2, 2)
    width: Count = 16
    stem: Literal["small", "imagenet"] = "small"
    momentum: Annotated[float, Interval(ge=0.0, lt=1.0)] = 0.9

    takes: ClassVar[tuple[str, ...]] = ("images",)
    scopes: ClassVar[tuple[str, ...]] = ("block",)
    tags: ClassVar[tuple[str, ...]] = ("first", "second")
    objective: ClassVar[str] = "classify"
    shows: ClassVar[tuple[str, ...]] = ()

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model from images of (height, width, channels) to `num_outputs` classes."""
        from models.resnet import ResNet

        return ResNet(self, channels=inputs[2], num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Vit:
    """A transformer over the patches of an image. Choose it where there is much data, or augmentation.

    `pool`: classify the mean of all patches, or a `cls` token of its own. `attention`: `cudnn` is flash attention, on
    an NVIDIA GPU and in bfloat16.
    """

    kind: Literal["vit"] = "vit"
    patch_size: Count = 2
    num_layers: Count = 4
    num_heads: Count = 4
    width: Count = 64
    hidden: Count = 128
    positions: Literal["sincos", "learned"] = "sincos"
    pool: Literal["mean", "cls"] = "mean"
    dropout: Rate = 0.0
    attention: Implementation = "xla"

    takes: ClassVar[tuple[str, ...]] = ("images",)
    scopes: ClassVar[tuple[str, ...]] = ("block", "attention", "attention_core", "ffn")
    tags: ClassVar[tuple[str, ...]] = ("qkv", "attn_ctx", "attn_out", "ffn_pre")
    objective: ClassVar[str] = "classify"
    shows: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4 (sine and cosine, of row and column)")
        check_head_size(self.attention, self.width // self.num_heads)

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model from images of (height, width, channels) to `num_outputs` classes."""
        if inputs[0] % self.patch_size or inputs[1] % self.patch_size:
            raise ValueError(
                f"an image of {_sides(inputs)} pixels cannot be cut into patches of {self.patch_size} × "
                f"{self.patch_size}; choose a model.patch_size that divides both sides"
            )
        from models.attention import check_implementation_available
        from models.vit import ViT

        check_implementation_available(self.attention)
        return ViT(self, image=inputs, num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Vae:
    """A variational autoencoder over images with values from 0 to 1. Choose it to generate, or for representations.

    `widths`: channels of each stage, which halves the resolution. `likelihood`: `bernoulli` for black on white,
    `gaussian` (one learned variance) for photographs. `beta`: the weight of the KL divergence.
    """

    kind: Literal["vae"] = "vae"
    widths: Counts = (32, 64)
    latent: Count = 16
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    beta: Positive = 1.0

    takes: ClassVar[tuple[str, ...]] = ("images",)
    scopes: ClassVar[tuple[str, ...]] = ("block",)
    tags: ClassVar[tuple[str, ...]] = ("first", "second")
    objective: ClassVar[str] = "elbo"
    shows: ClassVar[tuple[str, ...]] = ("samples", "reconstructions")

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model of images of (height, width, channels); it has no use for `num_outputs`."""
        times = 2 ** len(self.widths)
        if inputs[0] % times or inputs[1] % times:
            raise ValueError(
                f"{len(self.widths)} stages halve an image as often, but the sides of {_sides(inputs)} pixels are no "
                f"multiples of {times}; choose fewer model.widths"
            )
        from models.vae import VAE

        return VAE(self, image=inputs, rngs=rngs)


def _sides(image: tuple[int, ...]) -> str:
    return f"{image[0]} × {image[1]}"
