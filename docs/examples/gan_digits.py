"""A small GAN on digits (Goodfellow et al. 2014): two networks, two optimizers, pictures. No framework but optax."""

import jax
import jax.numpy as jnp
import optax


def make_network(key, sizes):
    layers = zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:], strict=True)
    return [{"w": jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)} for key, n, m in layers]


def apply_network(layers, x):
    for layer in layers[:-1]:
        x = jax.nn.leaky_relu(x @ layer["w"] + layer["b"], 0.2)
    return x @ layers[-1]["w"] + layers[-1]["b"]


class Program:
    weights = ("generator", "discriminator")  # what `export` and `init_from` take; the rest is the optimizers'

    def __init__(self, inputs, latent=16, width=128, lr=5e-4):
        self.shape, self.latent, self.width = inputs, latent, width
        self.tx = optax.adam(lr, b1=0.5)

    def init(self, key, example):
        pixels, (one, other) = example["inputs"].size, jax.random.split(key)
        generator = make_network(one, [self.latent, self.width, self.width, pixels])
        networks = {"generator": generator, "discriminator": make_network(other, [pixels, self.width, 1])}
        return networks | {f"{name}_opt": self.tx.init(params) for name, params in networks.items()}

    def draw(self, generator, key, count):
        return jax.nn.sigmoid(apply_network(generator, jax.random.normal(key, (count, self.latent))))

    def step(self, state, batch, key):
        real, keys = batch["inputs"].reshape(len(batch["inputs"]), -1), jax.random.split(key)

        def discriminator_loss(discriminator):
            fake = self.draw(state["generator"], keys[0], len(real))
            scores = apply_network(discriminator, real), apply_network(discriminator, fake)
            return (jax.nn.softplus(-scores[0]) + jax.nn.softplus(scores[1])).mean()

        def generator_loss(generator):
            fake = self.draw(generator, keys[1], len(real))
            return jax.nn.softplus(-apply_network(state["discriminator"], fake)).mean()

        new, metrics = {}, {}
        for name, loss in {"discriminator": discriminator_loss, "generator": generator_loss}.items():
            metrics[f"{name}_loss"], gradient = jax.value_and_grad(loss)(state[name])
            update, new[f"{name}_opt"] = self.tx.update(gradient, state[f"{name}_opt"])
            new[name] = optax.apply_updates(state[name], update)
        return new, metrics

    def evaluate(self, state, batch):  # how far each digit is from the nearest that is drawn
        real, fake = batch["inputs"].reshape(-1, 1, 64), self.draw(state["generator"], jax.random.key(0), 256)
        return {"distance": ((real - fake) ** 2).sum(axis=-1).min(axis=1)}

    def sample(self, state, key):
        return self.draw(state["generator"], key, 64).reshape(64, *self.shape)
