"""A variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114) of convolutions over images in [0, 1]."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from models import Vae
from models.scopes import scope, tag

HE = nnx.initializers.he_normal()

# Of the learned standard deviation of pixels in [0, 1]: it begins a little below their spread, and is kept from zero.
FIRST_LOG_SCALE, SMALLEST_LOG_SCALE = -1.5, -6.0

Images = Float[Array, "batch height width channels"]
Latent = Float[Array, "batch latent"]


class DownStage(nnx.Module):
    """A convolution with stride 2 and another one, each with ReLU: half the height and width."""

    def __init__(self, channels: int, width: int, rngs: nnx.Rngs):
        self.halve = nnx.Conv(channels, width, (3, 3), 2, kernel_init=HE, rngs=rngs)
        self.conv = nnx.Conv(width, width, (3, 3), kernel_init=HE, rngs=rngs)

    @scope("block")
    def __call__(self, x: Images) -> Float[Array, "batch rows columns features"]:
        """Return features of half the height and width."""
        x = jax.nn.relu(tag(self.halve(x), "first"))
        return jax.nn.relu(tag(self.conv(x), "second"))


class UpStage(nnx.Module):
    """Each pixel repeated four times, then two convolutions: no checkerboards (Odena et al. 2016, Distill)."""

    def __init__(self, channels: int, width: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(channels, width, (3, 3), kernel_init=HE, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), kernel_init=HE, rngs=rngs)

    @scope("block")
    def __call__(self, x: Images) -> Float[Array, "batch rows columns features"]:
        """Return features of twice the height and width."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jax.nn.relu(tag(self.first(x), "first"))
        return jax.nn.relu(tag(self.second(x), "second"))


class Encoder(nnx.Module):
    """Images to mean and log-variance of q(z|x), a diagonal Gaussian. Both start almost at zero, the prior."""

    def __init__(self, option: Vae, image: tuple[int, ...], rngs: nnx.Rngs):
        pairs = itertools.pairwise((image[2], *option.widths))
        self.stages = nnx.List(DownStage(inputs, outputs, rngs) for inputs, outputs in pairs)
        small = nnx.initializers.normal(0.01)
        self.out = nnx.Linear(
            math.prod(_grid_of_latent(option, image)), 2 * option.latent, kernel_init=small, rngs=rngs
        )

    def __call__(self, images: Images) -> tuple[Latent, Latent]:
        """Return mean and log-variance of q(z|x)."""
        x = images
        for stage in self.stages:
            x = stage(x)
        mean, log_variance = jnp.split(self.out(x.reshape(len(x), -1)), 2, axis=-1)
        return mean, log_variance


class Decoder(nnx.Module):
    """Latents to the logit of each pixel's mean."""

    def __init__(self, option: Vae, image: tuple[int, ...], rngs: nnx.Rngs):
        self.grid = _grid_of_latent(option, image)
        self.dense = nnx.Linear(option.latent, math.prod(self.grid), kernel_init=HE, rngs=rngs)
        widths = (*option.widths[::-1], option.widths[0])
        self.stages = nnx.List(UpStage(inputs, outputs, rngs) for inputs, outputs in itertools.pairwise(widths))
        self.out = nnx.Conv(widths[-1], image[2], (3, 3), rngs=rngs)

    def __call__(self, z: Latent) -> Images:
        """Return the logits of the pixels' means."""
        x = jax.nn.relu(self.dense(z)).reshape(len(z), *self.grid)
        for stage in self.stages:
            x = stage(x)
        return self.out(x)


class VAE(nnx.Module):
    """Encoder, decoder and the two terms of −ELBO; the prior is a standard Gaussian.

    Its noise has a random stream of its own, which is part of the train state. Where nothing keeps the moved stream, as
    in evaluation, a call is a function of the state. The gaussian likelihood has one variance for all pixels, and
    learns it (Rybkin et al. 2021, arXiv:2006.13202).
    """

    def __init__(self, option: Vae, *, image: tuple[int, ...], rngs: nnx.Rngs):
        self.beta, self.latent = option.beta, option.latent
        self.encoder = Encoder(option, image, rngs)
        self.decoder = Decoder(option, image, rngs)
        self.log_scale = nnx.Param(jnp.array(FIRST_LOG_SCALE)) if option.likelihood == "gaussian" else None
        self.noise = rngs.noise.fork()

    def __call__(self, images: Images) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return −log p(x|z) for one z drawn from q(z|x), and KL(q(z|x) ‖ p(z)), in nats per image."""
        mean, log_variance = self.encoder(images)
        # Drawn in float32 and then rounded: every precision has the same noise.
        noise = jax.random.normal(self.noise(), mean.shape, jnp.float32).astype(mean.dtype)
        logits = self.decoder(mean + jnp.exp(0.5 * log_variance) * noise)
        return self.reconstruction_loss(logits, images), kl_from_standard_normal(mean, log_variance)

    def reconstruction_loss(self, logits: Images, images: Images) -> Float[Array, "batch"]:
        """Return −log p(x|z) in nats per image, in float32; the logits are those of the pixels' means."""
        logits, images = logits.astype(jnp.float32), images.astype(jnp.float32)
        if self.log_scale is None:
            # −log of the Bernoulli probability, written so that no exponential overflows.
            nats = jax.nn.softplus(logits) - images * logits
        else:
            log_scale = jnp.maximum(self.log_scale[...].astype(jnp.float32), SMALLEST_LOG_SCALE)
            error = (images - jax.nn.sigmoid(logits)) * jnp.exp(-log_scale)
            nats = 0.5 * jnp.square(error) + log_scale + 0.5 * math.log(2.0 * math.pi)
        return nats.sum(axis=(1, 2, 3))

    def reconstruct(self, images: Images) -> Images:
        """Return images decoded from the mean of q(z|x), without noise: values in [0, 1]."""
        return jax.nn.sigmoid(self.decoder(self.encoder(images)[0]))

    def generate(self, key: Key[Array, ""], num: int) -> Images:
        """Return `num` new images, from latents drawn from the prior: the mean of each pixel, in [0, 1]."""
        return jax.nn.sigmoid(self.decoder(jax.random.normal(key, (num, self.latent))))


def kl_from_standard_normal(mean: Latent, log_variance: Latent) -> Float[Array, "batch"]:
    """Return KL(N(mean, e^log_variance) ‖ N(0, 1)) in nats, summed over the latent.

    Kingma & Welling 2014, appendix B.
    """
    mean, log_variance = mean.astype(jnp.float32), log_variance.astype(jnp.float32)
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).sum(axis=-1)


def _grid_of_latent(option: Vae, image: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (height, width, channels) of what the last stage of the encoder gives and the decoder's first takes."""
    halved = 2 ** len(option.widths)
    return image[0] // halved, image[1] // halved, option.widths[-1]
