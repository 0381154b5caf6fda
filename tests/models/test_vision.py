"""The models for images: statistics of batches, patches and their places, the bound that a VAE is trained for."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from models import Cnn, Model, Resnet, Vae, Vit
from models.objectives import OBJECTIVES
from models.remat_plan import RematPlan
from models.scopes import use_plan
from models.vae import kl_from_standard_normal
from models.vit import sine_cosine_positions
from runner.trace.remat_trace import find_scopes_and_tags
from tests.fresh import fresh

OPTIONS = (
    *(Cnn(widths=(4, 8), hidden=8), Resnet(stages=(1, 1), width=4), Resnet(stages=(1,), width=4, stem="imagenet")),
    *(Vit(num_layers=2, num_heads=2, width=8, hidden=16), Vit(num_layers=1, num_heads=2, width=8, positions="sincos")),
    *(Vae(widths=(4, 8), latent=2), Vae(widths=(4,), latent=2, likelihood="gaussian")),
)
SHAPES = ((28, 28, 1), (32, 32, 3), (224, 224, 3))
RESNET = OPTIONS[1]


def images(shape: tuple[int, ...] = (8, 8, 1), count: int = 4) -> dict[str, jax.Array]:
    inputs = np.random.default_rng(0).random((count, *shape), np.float32)
    return {"inputs": jnp.asarray(inputs), "label": jnp.arange(count, dtype=jnp.int32) % 10}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.kind)
def test_every_usual_shape_of_image_is_taken(option: Model) -> None:
    for shape in SHAPES:
        batch = jax.eval_shape(lambda shape=shape: images(shape, count=2))
        model = nnx.eval_shape(lambda shape=shape: option.build(shape, 10, nnx.Rngs(0)))
        given = nnx.eval_shape(lambda model, batch: OBJECTIVES[option.objective](model, batch), model, batch)
        assert all(values.shape == (2,) for values in given.values())


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 × 8 pixels cannot be cut into patches of 3 × 3"):
        Vit(patch_size=3).build((8, 8, 1), 10, nnx.Rngs(0))
    with pytest.raises(ValueError, match="too few"):
        Cnn(widths=(4, 4, 4, 4)).build((8, 8, 1), 10, nnx.Rngs(0))
    with pytest.raises(ValueError, match="no multiples of 8"):
        Vae(widths=(4, 4, 4)).build((28, 28, 1), 10, nnx.Rngs(0))


@pytest.mark.parametrize("scopes", [frozenset[str](), frozenset({"block"})], ids=["stored", "recomputed"])
def test_batch_statistics_advance_once_a_step(scopes: frozenset[str]) -> None:
    """Also where the forward pass is done twice."""
    model = RESNET.build((8, 8, 1), 10, nnx.Rngs(0))
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    batch = images()

    def loss(params: Any) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        return OBJECTIVES["classify"](model, batch)["loss"].mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    with use_plan(RematPlan(scopes)):
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params)
        (_, after), _ = step.lower().compile()(params)
    assert find_scopes_and_tags(step.jaxpr.jaxpr).scopes.keys() == scopes
    x = model.stem.conv(batch["inputs"])
    np.testing.assert_allclose(after["stem"]["norm"]["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(after["stem"]["norm"]["var"], 0.9 + 0.1 * x.var((0, 1, 2)), atol=1e-6)
    x = model.residual[0].first(jax.nn.relu((x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5)))
    np.testing.assert_allclose(after["residual"][0]["first_norm"]["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-5)


def test_in_evaluation_an_image_is_judged_alone() -> None:
    graphdef, params, rest = fresh(RESNET, (8, 8, 1), 10, 0.1)

    @jax.jit
    def judged(params: Any, inputs: Any) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        together, alone = model(inputs), model(inputs[:1])
        after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        model.train()
        return together, alone, model(inputs), after

    together, alone, training, after = judged(params, images()["inputs"])
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)
    assert np.abs(np.asarray(training[:1] - alone)).max() > 1e-3
    before = nnx.to_pure_dict(nnx.filter_state(rest, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_residual_block_begins_as_the_identity() -> None:
    model = RESNET.build((8, 8, 1), 10, nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 4), np.float32))
    np.testing.assert_array_equal(model.residual[0](x), x)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_the_places_of_patches_matter(positions: Any) -> None:
    """With them taken away, the mean over all patches could not tell one order from another."""
    option = Vit(num_layers=1, num_heads=2, width=8, hidden=16, positions=positions)
    graphdef, params, rest = fresh(option, (8, 8, 1), 10, 0.3)
    judge = jax.jit(lambda params, inputs: nnx.merge(graphdef, params, rest, copy=True)(inputs))
    inputs = images()["inputs"]
    moved = inputs.reshape(4, 4, 2, 8, 1)[:, ::-1].reshape(
        inputs.shape
    )  # the same patches, their rows in another order
    assert np.abs(np.asarray(judge(params, inputs) - judge(params, moved))).max() > 1e-3
    if positions == "learned":
        params["positions"] = jax.tree.map(jnp.zeros_like, params["positions"])
        np.testing.assert_allclose(judge(params, inputs), judge(params, moved), atol=1e-5)


def test_fixed_positions_differ_in_row_and_column() -> None:
    table = np.asarray(sine_cosine_positions(3, 5, 16))
    assert table.shape == (15, 16)
    assert len(np.unique(table.round(4), axis=0)) == 15
    np.testing.assert_array_equal(table[0, :8], table[4, :8])  # the same row
    np.testing.assert_array_equal(table[0, 8:], table[5, 8:])  # the same column


def test_kl_is_that_of_gaussians() -> None:
    mean, log_variance = 0.7, -1.3
    z = np.linspace(-12, 12, 20001)
    q, p = stats.norm(mean, math.exp(log_variance / 2)), stats.norm()
    expected = np.trapezoid(q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), z)
    found = kl_from_standard_normal(jnp.full((1, 3), mean), jnp.full((1, 3), log_variance))
    np.testing.assert_allclose(found, [3 * expected], rtol=1e-5)


def likelihoods(model: Any, logits: Any, image: Any) -> Any:
    """log p(x|z) of an image, by scipy."""
    mean = np.asarray(jax.nn.sigmoid(logits), np.float64)
    if model.log_scale is None:
        return stats.bernoulli.logpmf(image, mean).sum((1, 2, 3))
    return stats.norm(mean, math.exp(float(model.log_scale[...]))).logpdf(image).sum((1, 2, 3))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_the_bound_is_the_evidence_less_what_the_encoder_gets_wrong(likelihood: Any) -> None:
    """ELBO = log p(x) − KL(q(z|x) ‖ p(z|x)): the right side by quadrature over a latent of one dimension."""
    model: Any = Vae(widths=(2,), latent=1, likelihood=likelihood).build((4, 4, 1), 0, nnx.Rngs(1))
    model.decoder.out.kernel[...] *= 3.0
    model.encoder.out.bias[...] = jnp.array([0.4, -1.5])  # a variance that is not one
    image = np.asarray(np.random.default_rng(1).random((1, 4, 4, 1)) > 0.5, np.float32)
    z = np.linspace(-9, 9, 3001)[:, None]
    joint = likelihoods(model, model.decoder(jnp.asarray(z, jnp.float32)), image) + stats.norm.logpdf(z[:, 0])
    evidence = np.log(np.trapezoid(np.exp(joint - joint.max()), z[:, 0])) + joint.max()
    mean, log_variance = (float(each[0, 0]) for each in model.encoder(jnp.asarray(image)))
    q = stats.norm(mean, math.exp(log_variance / 2))
    wrong = np.trapezoid(q.pdf(z[:, 0]) * (q.logpdf(z[:, 0]) - (joint - evidence)), z[:, 0])
    assert wrong > 0.01
    batch = {"inputs": jnp.asarray(np.repeat(image, 20_000, axis=0))}
    losses = np.asarray(OBJECTIVES["elbo"](model, batch)["loss"], np.float64)
    assert abs(losses.mean() + evidence - wrong) < 5 * losses.std() / math.sqrt(len(losses))


def test_noise_is_part_of_the_state_and_moves_on_once_a_call() -> None:
    model: Any = Vae(widths=(4,), latent=2).build((8, 8, 1), 10, nnx.Rngs(0))
    batch = {**images(), "inputs": jnp.repeat(images()["inputs"][:1], 4, axis=0)}
    graphdef, rng, rest = nnx.split(model, nnx.RngState, ...)
    assert [path[0] for path, _ in nnx.to_flat_state(rng)] == ["noise", "noise"]
    model.eval()
    first, second = (model(batch["inputs"])[0] for _ in range(2))
    again: Any = nnx.merge(graphdef, rng, rest, copy=True)
    again.noise.count[...] = jnp.asarray(0, again.noise.count.dtype)
    np.testing.assert_array_equal(again(batch["inputs"])[0], first)  # a function of the state, also in evaluation
    assert int(again.noise.count[...]) == 1
    assert not np.array_equal(first, second)
    assert np.unique(np.asarray(first)).size == 4  # each example has noise of its own


def test_beta_weighs_the_divergence() -> None:
    model: Any = Vae(widths=(4,), latent=2, beta=4.0).build((8, 8, 1), 10, nnx.Rngs(0))
    found = OBJECTIVES["elbo"](model, images())
    assert found["kl"].min() > 0
    np.testing.assert_allclose(found["loss"], found["reconstruction"] + 4 * found["kl"], rtol=1e-6)


def test_pictures_of_a_vae_are_pictures() -> None:
    model: Any = OPTIONS[-1].build((8, 8, 1), 10, nnx.Rngs(0))
    inputs = images()["inputs"]
    for made in (model.reconstruct(inputs), model.generate(jax.random.key(0), 4)):
        assert made.shape == inputs.shape
        assert 0 <= made.min() < made.max() <= 1
    np.testing.assert_array_equal(model.reconstruct(inputs), model.reconstruct(inputs))  # without noise
    assert not np.array_equal(model.generate(jax.random.key(0), 4), model.generate(jax.random.key(1), 4))
