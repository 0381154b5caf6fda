"""The models there are: option, default and range of each. Free of jax, so a wrong command is answered at once.

A model option says what it takes (`tokens`, `features`, `images`), which remat scopes and tags it has, which objective
trains it, and what it can show (kinds of `eval`); `build` imports the heavy module. To add one: a dataclass here, a
module beside it, a YAML in conf/model/; the options of those for images are in vision.py. A user's own model or
objective needs none of that: `target` names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from models.choices import Implementation, check_head_size
from models.vision import Cnn, Resnet, Vae, Vit

if TYPE_CHECKING:
    from flax import nnx

    from models.objectives import ObjectiveFunction as Function

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0.0)]
Rate = Annotated[float, Interval(ge=0.0, lt=1.0)]


@dataclass(frozen=True, kw_only=True)
class Gpt:
    """A decoder-only transformer over tokens. Choose it for text.

    `num_kv_heads`: keys and values there are for all heads to share (null: every head has its own). `context`: the
    longest sequence, where positions are `learned`. `biases`: in every linear map. `tied`: the embedding is the output
    layer as well. tests/models/test_papers.py has GPT-2, Llama 2 and others written in these.

    Two change how it is computed and nothing else: with `loss_chunks` the output layer and the loss are computed for
    one part of the sequence after the other, so that there never are all logits at once; `attention`: `cudnn` is flash
    attention, on an NVIDIA GPU and in bfloat16.
    """

    kind: Literal["gpt"] = "gpt"
    num_layers: Count = 4
    num_heads: Count = 4
    num_kv_heads: Count | None = None
    width: Count = 128
    hidden: Count = 512
    activation: Literal["relu2", "gelu", "swiglu"] = "relu2"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: Positive = 1e-6
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: Positive = 10_000.0
    context: Count = 1024
    biases: bool = False
    tied: bool = True
    dropout: Rate = 0.0
    loss_chunks: Count = 1
    attention: Implementation = "xla"

    takes: ClassVar[tuple[str, ...]] = ("tokens",)
    scopes: ClassVar[tuple[str, ...]] = ("block", "attention", "attention_core", "ffn")
    tags: ClassVar[tuple[str, ...]] = ("qkv", "attn_ctx", "attn_out", "ffn_pre")
    wrap_user_objective: ClassVar[str] = "next_token"
    shows: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        if self.positions == "rotary" and self.width % (2 * self.num_heads):
            raise ValueError(
                f"width={self.width} must be a multiple of 2 × num_heads={2 * self.num_heads} (rotary pairs per head)"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads} (each is shared by "
                "as many heads)"
            )
        check_head_size(self.attention, self.width // self.num_heads)

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model; `inputs` is the shape of an example, `num_outputs` the vocabulary."""
        if self.positions == "learned" and inputs[0] > self.context:
            raise ValueError(
                f"positions are learned for model.context={self.context} tokens, but the data has sequences of "
                f"{inputs[0]}; shorten those, or raise it"
            )
        if inputs[0] % self.loss_chunks:
            divisors = [chunks for chunks in range(1, inputs[0] + 1) if inputs[0] % chunks == 0]
            nearest = min(divisors, key=lambda chunks: abs(chunks - self.loss_chunks))
            raise ValueError(
                f"model.loss_chunks={self.loss_chunks} must divide the sequences of {inputs[0]} tokens; the nearest "
                f"that does is {nearest}"
            )
        from models.attention import check_implementation_available
        from models.gpt import GPT

        check_implementation_available(self.attention)
        return GPT(self, vocab=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A plain multi-layer perceptron over feature vectors. Choose it for small tables and quick checks."""

    kind: Literal["mlp"] = "mlp"
    num_layers: Count = 2
    width: Count = 128
    dropout: Rate = 0.0

    takes: ClassVar[tuple[str, ...]] = ("features", "images")
    scopes: ClassVar[tuple[str, ...]] = ("block",)
    tags: ClassVar[tuple[str, ...]] = ("hidden",)
    wrap_user_objective: ClassVar[str] = "classify"
    shows: ClassVar[tuple[str, ...]] = ()

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model from examples of the shape `inputs` to `num_outputs` classes."""
        from models.mlp import MLP

        return MLP(self, num_inputs=math.prod(inputs), num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class ExternalModel:
    """A model of your own, in a file of the current directory or in an installed package.

    `target` is `module:attribute`: a class or a function, called as

        target(inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs, **options) -> nnx.Module

    `inputs` is the shape of one example; `num_outputs` the number of classes, for tokens the size of the vocabulary,
    where the label is a number or a vector its length, without a label 0. The target may say what it takes, as in
    `takes = ("images",)`.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    takes: ClassVar[tuple[str, ...]] = ()  # what it takes and has is known when it is imported
    scopes: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]] = ()
    wrap_user_objective: ClassVar[str] = ""  # the usual one for what the data gives: see Named
    shows: ClassVar[tuple[str, ...]] = ("text", "samples", "reconstructions")  # if it has the method

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model. Raises Unfit where the target makes none."""
        from models.user_model import build_user_model

        return build_user_model(self.target, self.options, inputs, num_outputs, rngs)


Model = Gpt | Mlp | Cnn | Resnet | Vit | Vae | ExternalModel


class InvalidModelOrObjective(TypeError):
    """What a user's own model or objective gave is not what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class NamedObjective:
    """An objective by name. `default`: the model's own; for a model of yours next_token on tokens, else classify."""

    kind: Literal["default", "classify", "next_token", "elbo"] = "default"

    def build(self, own: str) -> Function:
        """The function that is trained for, where the model's own is `own`."""
        from models.objectives import OBJECTIVES

        return OBJECTIVES[own if self.kind == "default" else self.kind]


@dataclass(frozen=True, kw_only=True)
class ExternalObjective:
    """An objective of your own. `target` is `module:function`, called as

        target(model: nnx.Module, batch: dict[str, Array], **options) -> dict[str, Float[Array, "batch"]]

    It gives "loss", which is minimized, and any other metric: each with one value per example, not a mean.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, own: str) -> Function:
        """The function; it raises Unfit when it is traced and gives something else."""
        from models.user_model import wrap_user_objective

        return wrap_user_objective(self.target, self.options)


Objective = NamedObjective | ExternalObjective
# What a named objective needs of a batch.
REQUIRED_BATCH_KEYS = {"classify": ("inputs", "label"), "next_token": ("tokens",), "elbo": ("inputs",)}
