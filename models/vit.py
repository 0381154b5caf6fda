"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929): an image is a sequence of patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models import PixelScale, Vit
from models.attention import Heads, tag_context
from models.scopes import layers, scope, tag

# As in the paper's code.
XAVIER = nnx.initializers.xavier_uniform()
Patches = Float[Array, "batch tokens features"]


class SelfAttention(nnx.Module):
    """Multi-head self-attention: every token attends to every one."""

    def __init__(self, option: Vit, rngs: nnx.Rngs):
        self.num_heads = option.num_heads
        self.implementation = option.attention
        self.qkv = nnx.Linear(option.width, 3 * option.width, kernel_init=XAVIER, rngs=rngs)
        self.out = nnx.Linear(option.width, option.width, kernel_init=XAVIER, rngs=rngs)

    @scope("attention")
    def __call__(self, x: Patches) -> Patches:
        """Return what each token gathers from all of them."""
        batch, tokens, width = x.shape
        qkv = tag(self.qkv(x), "qkv").reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        mixed = tag_context(self._mix_values(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]), self.implementation)
        return tag(self.out(mixed.reshape(batch, tokens, width)), "attn_out")

    @scope("attention_core")
    def _mix_values(self, q: Heads, k: Heads, v: Heads) -> Heads:
        return jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)


class VitFeedForward(nnx.Module):
    """Two linear maps around an exact GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, option: Vit, rngs: nnx.Rngs):
        almost_zero = nnx.initializers.normal(1e-6)
        self.up = nnx.Linear(option.width, option.hidden, kernel_init=XAVIER, bias_init=almost_zero, rngs=rngs)
        self.down = nnx.Linear(option.hidden, option.width, kernel_init=XAVIER, bias_init=almost_zero, rngs=rngs)

    @scope("ffn")
    def __call__(self, x: Patches) -> Patches:
        """Return what is added to each token."""
        return self.down(jax.nn.gelu(tag(self.up(x), "ffn_pre"), approximate=False))


class VitBlock(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, option: Vit, rngs: nnx.Rngs):
        self.norm_attention = nnx.LayerNorm(option.width, epsilon=option.layernorm_epsilon, rngs=rngs)
        self.attention = SelfAttention(option, rngs)
        self.norm_ffn = nnx.LayerNorm(option.width, epsilon=option.layernorm_epsilon, rngs=rngs)
        self.ffn = VitFeedForward(option, rngs)
        self.dropout = nnx.Dropout(option.dropout, rngs=rngs)

    @scope("block")
    def __call__(self, x: Patches) -> Patches:
        """Return the stream after this block."""
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class ViT(nnx.Module):
    """Patches, positions, blocks stacked under one scan, a norm, a linear head that starts at zero.

    The mean over tokens and fixed sine-cosine positions are as good as a cls token and learned ones, and simpler (Beyer
    et al. 2022, arXiv:2205.01580). ViT-B/16 as it was released is in tests/models/test_papers.py.
    """

    def __init__(self, option: Vit, *, image: tuple[int, ...], num_classes: int, rngs: nnx.Rngs):
        height, width, channels = image
        side = option.patch_size
        # Of weights that were trained on normalized images, how these were made.
        self.pixels: PixelScale | None = None
        self.num_layers = option.num_layers
        self.rows, self.columns = height // side, width // side
        self.patches = nnx.Conv(channels, option.width, (side, side), side, padding="VALID", rngs=rngs)
        has_cls = option.pool == "cls"
        self.cls = nnx.Param(jnp.zeros((1, 1, option.width))) if has_cls else None
        length = self.rows * self.columns + has_cls
        learned = option.positions == "learned"
        start = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(start(rngs.params(), (length, option.width))) if learned else None
        self.dropout = nnx.Dropout(option.dropout, rngs=rngs)

        @nnx.split_rngs(splits=option.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> VitBlock:
            return VitBlock(option, rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.LayerNorm(option.width, epsilon=option.layernorm_epsilon, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.head = nnx.Linear(option.width, num_classes, kernel_init=zeros, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Return the logits of the classes."""
        x = self.norm(layers(self.blocks, self.dropout(self.embed(images)), self.num_layers))
        return self.head(x[:, 0] if self.cls is not None else x.mean(axis=1))

    def embed(self, images: Float[Array, "batch height width channels"]) -> Patches:
        """Return the patches as tokens, row by row, with a cls token before them, positions added."""
        if self.pixels is not None:
            mean, std = (jnp.asarray(values, images.dtype) for values in (self.pixels.mean, self.pixels.std))
            images = (images - mean) / std
        patches = self.patches(images)
        x = patches.reshape(len(patches), -1, patches.shape[-1])
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
        if self.positions is not None:
            return x + self.positions[...]
        # The table is for patches only: a cls token has no place in the image, and stays without a position.
        table = sine_cosine_positions(self.rows, self.columns, x.shape[-1]).astype(x.dtype)
        return x.at[:, x.shape[1] - len(table) :].add(table)


def sine_cosine_positions(rows: int, columns: int, width: int) -> Float[Array, "tokens features"]:
    """Return fixed positions: sines and cosines of the row, then of the column.

    It is the encoding of Vaswani et al. 2017 (arXiv:1706.03762) in two dimensions; `width` is a multiple of 4.
    """
    frequency = 10_000.0 ** (-jnp.arange(width // 4) / max(width // 4 - 1, 1))
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (row, column)]
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=-1)
