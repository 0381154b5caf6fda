"""What a model makes for evaluations: texts that go on after a prompt, pictures from noise, pictures made again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.sources import Sources
from runner.config.evaluations import Evaluation, ReconstructionsEvaluation, SamplesEvaluation, TextEvaluation
from runner.errors import ConfigError
from runner.train.evaluation_files import encode_mosaic, encode_pairs, format_samples
from runner.train.step import make_key
from runner.types import State

# The method that a model has for an evaluation that it makes something for.
METHODS = {"text": "sample", "samples": "generate", "reconstructions": "reconstruct"}


@dataclass(frozen=True)
class ModelContent:
    """Asks a model for texts and pictures, the same ones each time for one seed.

    Attributes:
        model: makes a live model of a state.
        example: a model whose methods are looked at; none of its arrays needs to be there.
    """

    sources: Sources
    model: Callable[[State], nnx.Module]
    example: nnx.Module
    seed: int

    def check_evaluation(self, name: str, option: Evaluation) -> None:
        """Raise ConfigError where an evaluation asks for what the model cannot make."""
        method = METHODS.get(option.kind)
        if method and not hasattr(self.example, method):
            raise ConfigError(
                f"eval.{name}: {type(self.example).__name__} has no method `{method}`; leave eval.{name} out"
            )

    def make_content(self, option: Evaluation, state: State) -> str | bytes:
        """Return a text, or a picture as PNG."""
        model = self.model(state)
        if isinstance(option, TextEvaluation):
            return format_samples(self.continue_prompts(option, model))
        if isinstance(option, SamplesEvaluation):
            images = _call_method(*nnx.split(model), "generate", option.count, make_key(self.seed))
            return encode_mosaic(np.asarray(images, np.float32), round(option.count**0.5))
        assert isinstance(option, ReconstructionsEvaluation)
        images = self.sources.eval.take(np.arange(min(option.count, len(self.sources.eval))))["inputs"]
        return encode_pairs(
            images, np.asarray(_call_method(*nnx.split(model), "reconstruct", None, images), np.float32)
        )

    def sample_text(self, state: State) -> str | None:
        """Return how a language model goes on after a text it has not seen; None for other models, or other data."""
        model = self.model(state)
        if not self.can_continue_text(model):
            return None
        ((prompt, text),) = self.continue_prompts(TextEvaluation(count=1, new_tokens=240), model)
        # A terminal obeys control characters.
        return "".join(char if char.isprintable() or char == "\n" else "·" for char in prompt + text)

    def subject(self, state: State) -> nnx.Module:
        """Return the live model of a state, for an evaluation of the user's own; its arrays are its own as well."""
        # As much memory as the gradient takes in a step, which is not there while something is evaluated.
        variables = ("params", "frozen", "rng", "extra")
        copied = jax.tree.map(jnp.copy, {name: state[name] for name in variables if name in state})
        return self.model({**state, **copied})

    def can_continue_text(self, model: nnx.Module) -> bool:
        """Return whether a model can go on after a text, and what it makes can be read."""
        return self.sources.decode is not None and hasattr(model, METHODS["text"])

    def continue_prompts(self, option: TextEvaluation, model: nnx.Module) -> list[tuple[str, str]]:
        """Return beginnings of examples that lie apart in the held-out data, and how the model goes on after each."""
        source, decode = self.sources.eval, self.sources.decode or (lambda tokens: " ".join(map(str, tokens)))
        indices = np.linspace(0, len(source) - 1, option.count).astype(np.int64)
        tokens = source.take(indices)["tokens"]
        # Of a pair of answers the preferred one.
        prompts = tokens.reshape(len(tokens), -1, tokens.shape[-1])[:, 0, : option.prompt_tokens].astype(np.int32)
        # Padding below 0 is seen as 0, as in training.
        prompts = np.maximum(prompts, 0)
        room = (getattr(model, "context", None) or math.inf) - option.prompt_tokens
        num_tokens = int(max(0, min(option.new_tokens, room)))
        keys = jax.random.split(make_key(self.seed), option.count)
        split = nnx.split(model)
        continued = [
            np.asarray(_call_method(*split, "sample", num_tokens, prompt, key, option.temperature))
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        return [(decode(prompt), decode(all_[len(prompt) :])) for prompt, all_ in zip(prompts, continued, strict=True)]


@partial(jax.jit, static_argnums=(0, 2, 3))
def _call_method(
    graphdef: nnx.GraphDef,
    variables: nnx.State,
    method: str,
    count: int | None,
    *arrays: jax.Array | np.ndarray | float,
) -> jax.Array:
    """Call a method of a model with arrays, and with how many it is to make; compiled once for each."""
    counts = () if count is None else (count,)
    return getattr(nnx.merge(graphdef, variables), method)(*arrays, *counts)
