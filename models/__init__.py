"""The catalogue of models and objectives: options, defaults and ranges. Free of jax, so errors come before it starts.

Every option is a frozen dataclass; `kind` is its name on the command line and in conf/model/. Beside its fields a model
says, as class variables:

- takes: the kinds of data it can be given: "tokens", "features" (a vector) or "images".
- scopes: the regions that `remat` may recompute, as they are declared with models.scopes.scope.
- tags: the values that `remat=names` may store, as they are named with models.scopes.tag.
- objective: the objective that trains it unless another one is chosen.
- shows: the evaluations beside metrics that it can do ("text", "samples", "reconstructions").
- layers: other names for linear layers that `tune=lora` may adapt, each with the end of the layer's path (a model may
  leave this out: a path is a name as well).

Its `build` imports the module that needs jax and flax. To add a model, write a dataclass here and name it in `Model`,
put its code in a module beside this one, and its defaults in a YAML in conf/model/. A model or an objective of a user's
own needs none of that: `target` names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen

if TYPE_CHECKING:
    from flax import nnx

    from models.objectives import BatchObjective

Count = Annotated[int, Ge(1)]
Counts = Annotated[tuple[Count, ...], MinLen(1)]  # one for each stage of a network
Positive = Annotated[float, Gt(0.0)]
Rate = Annotated[float, Interval(ge=0.0, lt=1.0)]
# The linear layers of a transformer's block, by names that go with those of its tags.
BLOCK_LAYERS: Mapping[str, str] = {
    "attn_out": "attention.out",
    "ffn_up": "ffn.up",
    "ffn_gate": "ffn.gate",
    "ffn_down": "ffn.down",
}
# Who computes attention.
Implementation = Literal["xla", "cudnn"]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Stretch the long wavelengths of rotary positions, as Llama 3.1 does for a longer context (arXiv:2407.21783).

    Attributes:
        factor: the wavelengths that are longer than original_context ÷ low_frequency grow by this much.
        low_frequency: see `factor`; between both the growth is interpolated.
        high_frequency: wavelengths that are shorter than original_context ÷ high_frequency stay.
        original_context: the tokens that positions were trained for before they were stretched.
    """

    factor: Positive
    low_frequency: Positive
    high_frequency: Positive
    original_context: Count

    def __post_init__(self) -> None:
        if self.high_frequency <= self.low_frequency:
            raise ValueError(
                f"high_frequency={self.high_frequency} must be more than low_frequency={self.low_frequency}"
            )


@dataclass(frozen=True, kw_only=True)
class Gpt:
    """A decoder-only transformer over tokens. Choose it for text.

    tests/models/test_papers.py writes GPT-2, Llama 2 and others in these fields. `loss_chunks` and `attention` change
    how it is computed and nothing else.

    Attributes:
        num_layers: blocks, each attention and a feed-forward part.
        num_heads: attention heads, which share the width.
        num_kv_heads: heads with keys and values of their own, each shared by as many heads; null: all of them.
        head_dim: numbers of a head; null: width ÷ num_heads.
        width: numbers for each token between the blocks.
        hidden: numbers for each token within the feed-forward part.
        activation: of the feed-forward part; `swiglu` has a third matrix, a gate; `gelu` is the approximation with
            tanh.
        norm: before each part and at the end.
        norm_epsilon: what is added to the variance before its root is taken.
        positions: `rotary` turns queries and keys; `learned` adds a vector for each of `context` positions.
        rotary_base: wavelengths of rotary positions grow up to this, times 2π.
        rotary_scaling: stretches the long ones of these; null: none.
        context: the longest sequence where positions are learned.
        window: the longest sequence where attention was trained to look no further back; null: any. A longer one is
            refused, for attention here looks at all of it.
        biases: add one to every linear map.
        qkv_biases: to those that make queries, keys and values; null: as `biases` says.
        attn_out_biases: to the one after attention; null: as `biases` says.
        ffn_biases: to those of the feed-forward part; null: as `biases` says.
        qk_norm: an RMSNorm over each head of the queries and of the keys (Dehghani et al. 2023, arXiv:2302.05442).
        tied: the embedding is the output layer as well.
        dropout: share of values that are set to zero in training.
        loss_chunks: the output layer and the loss are computed for one part of the sequence after the other, in so many
            parts, so that the logits of all positions never exist at once.
        attention: `cudnn` is flash attention, on an NVIDIA GPU and in bfloat16.
    """

    kind: Literal["gpt"] = "gpt"
    num_layers: Count = 4
    num_heads: Count = 4
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    width: Count = 128
    hidden: Count = 512
    activation: Literal["relu2", "relu", "gelu", "gelu_exact", "swiglu"] = "relu2"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: Positive = 1e-6
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: Positive = 10_000.0
    rotary_scaling: RotaryScaling | None = None
    context: Count = 1024
    window: Count | None = None
    biases: bool = False
    qkv_biases: bool | None = None
    attn_out_biases: bool | None = None
    ffn_biases: bool | None = None
    qk_norm: bool = False
    tied: bool = True
    dropout: Rate = 0.0
    loss_chunks: Count = 1
    attention: Implementation = "xla"

    takes: ClassVar[tuple[str, ...]] = ("tokens",)
    scopes: ClassVar[tuple[str, ...]] = ("block", "attention", "attention_core", "ffn")
    tags: ClassVar[tuple[str, ...]] = ("qkv", "attn_ctx", "attn_out", "ffn_pre")
    layers: ClassVar[Mapping[str, str]] = BLOCK_LAYERS
    objective: ClassVar[str] = "next_token"
    shows: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        if self.positions == "rotary" and self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary pairs per head)")
        if self.positions == "rotary" and self.head_dim is None and self.width % (2 * self.num_heads):
            raise ValueError(
                f"width={self.width} must be a multiple of 2 × num_heads={2 * self.num_heads} (rotary pairs per head)"
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads} (each is shared by "
                "as many heads)"
            )
        _check_head_size(self.attention, self.head_size)

    @property
    def head_size(self) -> int:
        """Return the numbers of one head."""
        return self.head_dim or self.width // self.num_heads

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """Return a fresh model for sequences of the shape `inputs` over a vocabulary of `num_outputs` tokens.

        Raises ValueError where the sequences are longer than learned positions, or `loss_chunks` does not divide them.
        """
        # Checked here and not with the other fields: only the data knows how long a sequence is.
        if self.positions == "learned" and inputs[0] > self.context:
            raise ValueError(
                f"positions are learned for model.context={self.context} tokens, but the data has sequences of "
                f"{inputs[0]}; shorten those, or raise it"
            )
        if self.window is not None and inputs[0] > self.window:
            raise ValueError(
                f"attention was trained to look back model.window={self.window} tokens, and looks at all {inputs[0]} "
                f"of a sequence here; choose data.seq_len={self.window} or less"
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
    """A plain multi-layer perceptron over feature vectors. Choose it for small tables and quick checks.

    Attributes:
        num_layers: hidden layers.
        width: numbers in each.
        dropout: share of values that are set to zero in training.
    """

    kind: Literal["mlp"] = "mlp"
    num_layers: Count = 2
    width: Count = 128
    dropout: Rate = 0.0

    takes: ClassVar[tuple[str, ...]] = ("features", "images")
    scopes: ClassVar[tuple[str, ...]] = ("block",)
    tags: ClassVar[tuple[str, ...]] = ("hidden",)
    objective: ClassVar[str] = "classify"
    shows: ClassVar[tuple[str, ...]] = ()

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """Return a fresh model from examples of the shape `inputs` to `num_outputs` classes."""
        from models.mlp import MLP

        return MLP(self, num_inputs=math.prod(inputs), num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Cnn:
    """A small convolutional network over images: stages of two convolutions and a pooling, each half as wide and high.

    Choose it as the first thing to try on images.

    Attributes:
        widths: channels of each stage.
        hidden: numbers in the layer between the last stage and the classes.
        dropout: share of values that are set to zero in training.
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
        """Return a fresh model from images of (height, width, channels) to `num_outputs` classes.

        Raises ValueError where an image is too small for so many stages.
        """
        if min(inputs[:2]) < 2 ** len(self.widths):
            raise ValueError(
                f"{len(self.widths)} stages halve an image as often, and {_format_sides(inputs)} pixels are too few; "
                "choose fewer model.widths"
            )
        from models.cnn import CNN

        return CNN(self, image=inputs, num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Resnet:
    """A residual network with batch normalization over images. Choose it for accuracy without much data.

    With `stages=[2,2,2,2]`, `width=64` and the imagenet stem it is ResNet-18.

    Attributes:
        stages: the number of blocks of each stage.
        width: channels of the first stage; each further stage has twice as many and half the resolution.
        stem: `small` keeps the resolution, `imagenet` quarters it first.
        momentum: of the running statistics that batch normalization uses in evaluation.
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
        """Return a fresh model from images of (height, width, channels) to `num_outputs` classes."""
        from models.resnet import ResNet

        return ResNet(self, channels=inputs[2], num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Vit:
    """A transformer over the patches of an image. Choose it where there is much data, or augmentation.

    Attributes:
        patch_size: side of a patch in pixels; it divides both sides of an image.
        num_layers: blocks, each attention and a feed-forward part.
        num_heads: attention heads, which share the width.
        width: numbers for each patch between the blocks.
        hidden: numbers for each patch within the feed-forward part.
        layernorm_epsilon: what is added to the variance before its root is taken.
        positions: sines and cosines of row and column, or a learned vector for each patch.
        pool: what is classified: the mean of all patches, or a `cls` token of its own.
        dropout: share of values that are set to zero in training.
        attention: `cudnn` is flash attention, on an NVIDIA GPU and in bfloat16.
    """

    kind: Literal["vit"] = "vit"
    patch_size: Count = 2
    num_layers: Count = 4
    num_heads: Count = 4
    width: Count = 64
    hidden: Count = 128
    layernorm_epsilon: Positive = 1e-6
    positions: Literal["sincos", "learned"] = "sincos"
    pool: Literal["mean", "cls"] = "mean"
    dropout: Rate = 0.0
    attention: Implementation = "xla"

    takes: ClassVar[tuple[str, ...]] = ("images",)
    scopes: ClassVar[tuple[str, ...]] = ("block", "attention", "attention_core", "ffn")
    tags: ClassVar[tuple[str, ...]] = ("qkv", "attn_ctx", "attn_out", "ffn_pre")
    layers: ClassVar[Mapping[str, str]] = BLOCK_LAYERS
    objective: ClassVar[str] = "classify"
    shows: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        # Raised while the configuration is validated, before jax starts.
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}")
        if self.positions == "sincos" and self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of 4 (sine and cosine, of row and column)")
        _check_head_size(self.attention, self.width // self.num_heads)

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """Return a fresh model from images of (height, width, channels) to `num_outputs` classes.

        Raises ValueError where an image cannot be cut into patches.
        """
        if inputs[0] % self.patch_size or inputs[1] % self.patch_size:
            raise ValueError(
                f"an image of {_format_sides(inputs)} pixels cannot be cut into patches of {self.patch_size} × "
                f"{self.patch_size}; choose a model.patch_size that divides both sides"
            )
        from models.attention import check_implementation_available
        from models.vit import ViT

        check_implementation_available(self.attention)
        return ViT(self, image=inputs, num_classes=num_outputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class Vae:
    """A variational autoencoder over images with values from 0 to 1. Choose it to generate, or for representations.

    Attributes:
        widths: channels of each stage, which halves the resolution.
        latent: numbers that an image is encoded in.
        likelihood: `bernoulli` for black on white, `gaussian` (one learned variance) for photographs.
        beta: weight of the KL divergence.
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
        """Return a fresh model of images of (height, width, channels); `num_outputs` is not used.

        Raises ValueError where the stages cannot halve the sides of an image evenly.
        """
        # The decoder doubles what the encoder halved: with a remainder it would give another size.
        times = 2 ** len(self.widths)
        if inputs[0] % times or inputs[1] % times:
            raise ValueError(
                f"{len(self.widths)} stages halve an image as often, but the sides of {_format_sides(inputs)} pixels "
                f"are no multiples of {times}; choose fewer model.widths"
            )
        from models.vae import VAE

        return VAE(self, image=inputs, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class PixelScale:
    """Say how images with values from 0 to 1 are normalized: minus `mean`, divided by `std`.

    Attributes:
        mean: what is subtracted from the values of each channel.
        std: what they are divided by then.
    """

    mean: tuple[float, ...]
    std: tuple[Positive, ...]


@dataclass(frozen=True, kw_only=True)
class HfShape:
    """Hold what the files of a Hugging Face folder say of its model (models/hf_config.py).

    Attributes:
        family: the name of its family.
        network: the model of ours that computes the same.
        vocab: the rows of its embedding; 0 where it takes images.
        image: height, width and channels of an image; empty where it takes tokens.
        pixels: how images are normalized before they are given to it; null: not at all.
    """

    family: str
    network: Gpt | Vit
    vocab: Annotated[int, Ge(0)] = 0
    image: tuple[Count, ...] = ()
    pixels: PixelScale | None = None


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """The model that a Hugging Face folder describes, as one of ours: of gpt2, llama, mistral, qwen2, qwen3 or vit.

    Its weights are taken with `init_from=hf:DIR`; without that they are fresh.

    Attributes:
        path: the folder; null: the one of `init_from=hf:DIR`.
        shape: what its config.json says, written down when a run begins, which needs the folder no more from then on.
        normalize: images, with values from 0 to 1, are normalized as its preprocessor_config.json says; false: the data
            has done that.
        dropout: share of values that are set to zero in training.
        loss_chunks: as of `gpt`.
        attention: `cudnn` is flash attention, on an NVIDIA GPU and in bfloat16.
    """

    kind: Literal["hf"] = "hf"
    path: str | None = None
    shape: HfShape | None = None
    normalize: bool = True
    dropout: Rate = 0.0
    loss_chunks: Count = 1
    attention: Implementation = "xla"

    # What it takes, trains for and shows is known with its shape: `__post_init__` says it of each object.
    takes: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[tuple[str, ...]] = Gpt.scopes
    tags: ClassVar[tuple[str, ...]] = Gpt.tags
    layers: ClassVar[Mapping[str, str]] = Gpt.layers
    objective: ClassVar[str] = ""
    shows: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        if self.shape is not None:
            for name in ("takes", "scopes", "tags", "layers", "objective", "shows", "num_heads"):
                object.__setattr__(self, name, getattr(self.network, name))

    @property
    def network(self) -> Gpt | Vit:
        """Return the model of ours. Raises ValueError where the folder was not read yet, or it has no such parts."""
        if self.shape is None:
            raise ValueError(f"path={self.path}: its config.json was not read")
        network, changes = self.shape.network, {"dropout": self.dropout, "attention": self.attention}
        if isinstance(network, Gpt):
            return replace(network, loss_chunks=self.loss_chunks, **changes)  # type: ignore[arg-type]
        if self.loss_chunks != 1:
            raise ValueError(
                f"loss_chunks={self.loss_chunks}: {self.shape.family} has no sequence to part; leave it out"
            )
        return replace(network, **changes)  # type: ignore[arg-type]

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """Return a fresh model, of tokens with the vocabulary of the folder.

        Raises ValueError where the data does not fit it.
        """
        network, shape = self.network, self.shape
        assert shape is not None, "the network is made of it"
        if isinstance(network, Vit):
            if inputs != shape.image:
                sides = " × ".join(map(str, shape.image))
                raise ValueError(f"takes images of {sides}, and the data has {' × '.join(map(str, inputs))}")
            made: Any = network.build(inputs, num_outputs, rngs)
            made.pixels = shape.pixels if self.normalize else None
            return made
        if num_outputs > shape.vocab:
            raise ValueError(
                f"the data has a vocabulary of {num_outputs:,} tokens, and the model one of {shape.vocab:,}; make "
                "tokens with the tokenizer of that folder"
            )
        return network.build(inputs, shape.vocab, rngs)


@dataclass(frozen=True, kw_only=True)
class ExternalModel:
    """A model of your own, in a file of the current directory or in an installed package.

    The target is called as

        target(inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs, **options) -> nnx.Module

    `inputs` is the shape of one example. `num_outputs` is the number of classes; for tokens the size of the vocabulary,
    where the label is a number or a vector its length, without a label 0. A target that was written for something else
    is called by the names of its parameters: `in_features`, `num_classes`, `rngs` and the like; what no name says is
    an option. The target may say what it takes, as in `takes = ("images",)`.

    In training and evaluation the model is called with the inputs. Where its `__call__` has an argument `train`,
    `training`, `deterministic`, `use_running_average` or `rngs`, it is told.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`, a class or a function.
        options: what it is called with by name, as in `+model.options.width=64`. Where the parameter is a dataclass,
            a mapping of its fields, or the name of a method of it that makes one.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    # What it takes, declares and tags is known only when the target is imported, built and traced.
    takes: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]] = ()
    # Empty: the usual objective for what the data gives, as NamedObjective has it.
    objective: ClassVar[str] = ""
    # Whatever the model has the method for.
    shows: ClassVar[tuple[str, ...]] = ("text", "samples", "reconstructions")

    def build(self, inputs: tuple[int, ...], num_outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """Return a fresh model; raises InvalidModelOrObjective where the target makes none."""
        from models.user_model import build_user_model

        return build_user_model(self.target, self.options, inputs, num_outputs, rngs)


Model = Gpt | Mlp | Cnn | Resnet | Vit | Vae | HfModel | ExternalModel


class InvalidModelOrObjective(TypeError):
    """A model or an objective of the user's own returned something that the runner cannot work with."""


@dataclass(frozen=True, kw_only=True)
class NamedObjective:
    """An objective of models/objectives.py by its name.

    `default` is the model's own; for a model of the user's it is `next_token` on tokens, `regress` where labels are
    fractions, else `classify`. On conversations it is `sft`: cross-entropy of the answers alone; on pairs of answers
    `dpo`.
    """

    kind: Literal["default", "classify", "next_token", "sft", "elbo", "regress"] = "default"

    def build(self, own: str, num_outputs: int, *, ignored: int | None) -> BatchObjective:
        """Return what is trained for; `own`: the model's; `ignored`: a label that counts nowhere."""
        from models.objectives import make_objective

        name = own if self.kind == "default" else self.kind
        # The usual one for pairs of answers.
        if name == "dpo":
            return Dpo().build(own, num_outputs, ignored=ignored)
        return make_objective(name, num_outputs, ignored=ignored)


@dataclass(frozen=True, kw_only=True)
class ExternalObjective:
    """An objective of your own.

    The target is called as

        target(model: nnx.Module, batch: dict[str, Array], **options) -> dict[str, Float[Array, "batch"]]

    It returns "loss", which is minimized, and any other metric: each with one value per example, not a mean. A metric
    that is no mean (F1, AUC) is an object with `merge(other)` and `compute()`, as google-metrax has them. Where the
    function has an argument `training`, `rngs` or `weights` (Float[batch], 0 for an example that only fills up the last
    batch of an evaluation), it is told.

    Attributes:
        target: `module:function` or `path/to/file.py:function`.
        options: what it is called with by name, as in `+objective.options.delta=0.1`.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, own: str, num_outputs: int, *, ignored: int | None) -> BatchObjective:
        """Return what is trained for; tracing it raises InvalidModelOrObjective where it gives something else."""
        from models.user_model import wrap_user_objective

        return wrap_user_objective(self.target, self.options)


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Learn from a trained model as well as from labels: classes, next tokens, or answers (Hinton et al. 2015).

    Attributes:
        teacher: whose model is asked: `RUN`, `RUN@STEP` or `RUN@best`, or `hf:DIR`, a folder of Hugging Face. Its
            weights never change.
        temperature: both distributions are softened by it.
        weight: share of the teacher's term in the loss; the labels have the rest.
    """

    kind: Literal["distill"] = "distill"
    teacher: Annotated[str, MinLen(1)]
    temperature: Positive = 2.0
    weight: Annotated[float, Interval(ge=0.0, le=1.0)] = 0.5

    def build(self, own: str, num_outputs: int, *, ignored: int | None, teach: Callable[..., Any]) -> BatchObjective:
        """Return what is trained for; `teach` asks the teacher."""
        from models.distillation import Distillation, make_distillation

        return make_distillation(own, Distillation(teach, self.temperature, self.weight, num_outputs, ignored))


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """Prefer one of two answers: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290).

    The model as it was when training began is kept beside it, and never changes; what is learnt is how much more likely
    than there each answer becomes.

    Attributes:
        beta: how strongly the model is held to what it was; the more, the nearer it stays.
        label_smoothing: share of the pairs that are taken to be labelled the wrong way round (conservative DPO).
    """

    kind: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Interval(ge=0.0, lt=0.5)] = 0.0

    def build(self, own: str, num_outputs: int, *, ignored: int | None) -> BatchObjective:
        """Return what is trained for."""
        from models.preferences import make_dpo

        return make_dpo(self.beta, self.label_smoothing, num_outputs)


Objective = NamedObjective | Distill | Dpo | ExternalObjective

# What a teacher can be learnt from in the place of.
TAUGHT = ("classify", "next_token", "sft")

# What an objective that is chosen by name reads from a batch.
REQUIRED_BATCH_KEYS = {
    "classify": ("inputs", "label"),
    "regress": ("inputs", "label"),
    "next_token": ("tokens",),
    "sft": ("tokens", "answers"),
    "dpo": ("tokens", "answers"),
    "elbo": ("inputs",),
}
# What it measures. `next_token` gives bits for each byte or for each token, which only the data knows.
OBJECTIVE_METRICS = {
    "classify": ("loss", "accuracy"),
    "regress": ("loss", "absolute_error"),
    "next_token": ("loss", "bits_per_byte", "bits_per_token"),
    "sft": ("loss", "bits_per_byte", "bits_per_token"),
    "dpo": ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"),
    "elbo": ("loss", "reconstruction", "kl"),
    # Accuracy where there are classes.
    "distill": ("loss", "label_loss", "teacher_loss", "accuracy"),
}


def _check_head_size(attention: Implementation, head_dim: int) -> None:
    """Raise ValueError where cuDNN has no flash attention for heads of that size."""
    if attention == "cudnn" and (head_dim % 8 or head_dim > 256):
        raise ValueError(
            f"attention=cudnn takes heads of up to 256 numbers in multiples of 8, and width ÷ num_heads is {head_dim}; "
            "change one of them, or choose attention=xla"
        )


def _format_sides(image: tuple[int, ...]) -> str:
    return f"{image[0]} × {image[1]}"
