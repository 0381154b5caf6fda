"""A residual network (He et al. 2016, arXiv:1512.03385) of basic blocks with batch normalization."""

from __future__ import annotations

import itertools

import jax
from flax import nnx
from jaxtyping import Array, Float

from models import Resnet
from models.scopes import scope, tag

# From the output side: the gradient keeps its scale through ReLUs (He et al. 2015, arXiv:1502.01852, "fan out").
HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

Images = Float[Array, "batch height width channels"]


class BatchNorm(nnx.BatchNorm):
    """Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) whose result has the precision of its input.

    The statistics are float32 whatever comes in; flax would let them raise everything behind them to float32.
    """

    def __call__(self, x: Images) -> Images:  # type: ignore[override]
        """Return the normalized images in their own precision."""
        return super().__call__(x).astype(x.dtype)


class Stem(nnx.Module):
    """The layers before the blocks: `small` one 3 × 3 convolution, `imagenet` 7 × 7 with stride 2 and a pooling."""

    def __init__(self, option: Resnet, channels: int, rngs: nnx.Rngs):
        self.quarters = option.stem == "imagenet"
        size, stride, margin = (7, 2, 3) if self.quarters else (3, 1, 1)
        self.conv = _build_conv(channels, option.width, size, stride, margin, rngs)
        self.norm = BatchNorm(option.width, momentum=option.momentum, rngs=rngs)

    def __call__(self, x: Images) -> Float[Array, "batch rows columns features"]:
        """Return the features that the first block gets."""
        x = jax.nn.relu(self.norm(self.conv(x)))
        return nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.quarters else x


class ResidualBlock(nnx.Module):
    """The basic block: x + norm(conv(relu(norm(conv(x))))), then ReLU.

    Where the shape changes, x goes through a 1 × 1 convolution before it is added. The last norm of the branch starts
    at zero, so that a block begins as the identity (Goyal et al. 2017, arXiv:1706.02677, §5.1).
    """

    def __init__(self, channels: int, width: int, stride: int, momentum: float, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.first = _build_conv(channels, width, 3, stride, 1, rngs)
        self.first_norm = BatchNorm(width, momentum=momentum, rngs=rngs)
        self.second = _build_conv(width, width, 3, 1, 1, rngs)
        self.second_norm = BatchNorm(width, momentum=momentum, scale_init=zeros, rngs=rngs)
        changes = stride > 1 or channels != width
        self.shortcut = _build_conv(channels, width, 1, stride, 0, rngs) if changes else None
        self.shortcut_norm = BatchNorm(width, momentum=momentum, rngs=rngs) if changes else None

    @scope("block")
    def __call__(self, x: Images) -> Float[Array, "batch rows columns features"]:
        """Return the features after this block."""
        branch = jax.nn.relu(self.first_norm(tag(self.first(x), "first")))
        branch = self.second_norm(tag(self.second(branch), "second"))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return jax.nn.relu(x + branch)


class ResNet(nnx.Module):
    """Stem, stages of blocks, the mean over all pixels, a linear head.

    The running statistics (`nnx.BatchStat`) are part of the train state; in evaluation they are used instead of those
    of the batch. stages (2, 2, 2, 2), width 64 and the imagenet stem make ResNet-18.
    """

    def __init__(self, option: Resnet, *, channels: int, num_classes: int, rngs: nnx.Rngs):
        self.stem = Stem(option, channels, rngs)
        stages = [stage for stage, num_blocks in enumerate(option.stages) for _ in range(num_blocks)]
        self.residual = nnx.List(
            ResidualBlock(option.width * 2**before, option.width * 2**stage, 1 + stage - before, option.momentum, rngs)
            for before, stage in itertools.pairwise([0, *stages])
        )
        small = nnx.initializers.normal(0.01)  # Goyal et al. 2017, §5.1
        self.head = nnx.Linear(option.width * 2 ** stages[-1], num_classes, kernel_init=small, rngs=rngs)

    def __call__(self, images: Images) -> Float[Array, "batch classes"]:
        """Return the logits of the classes."""
        x = self.stem(images)
        for block in self.residual:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def _build_conv(channels: int, width: int, size: int, stride: int, margin: int, rngs: nnx.Rngs) -> nnx.Conv:
    """Return a square convolution without bias, for the norm behind it has one."""
    # Equal on both sides: "SAME" would pad one side more where the stride is 2.
    margins = ((margin, margin), (margin, margin))
    return nnx.Conv(channels, width, (size, size), stride, padding=margins, use_bias=False, kernel_init=HE, rngs=rngs)
