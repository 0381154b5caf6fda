"""An Equinox network with optax and an average of its weights, on digits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax


class Network(eqx.Module):
    convolution: eqx.nn.Conv2d
    layers: list

    def __init__(self, key, side, channels, width, num_classes):
        first, second, third = jax.random.split(key, 3)
        self.convolution = eqx.nn.Conv2d(channels, 16, 3, padding=1, key=first)
        self.layers = [
            eqx.nn.Linear(16 * (side // 2) ** 2, width, key=second),
            eqx.nn.Dropout(0.2),
            eqx.nn.Linear(width, num_classes, key=third),
        ]

    def __call__(self, image, key=None):
        x = jax.nn.relu(self.convolution(jnp.moveaxis(image, -1, 0)))
        x = eqx.nn.MaxPool2d(2, 2)(x).reshape(-1)
        x = self.layers[1](jax.nn.relu(self.layers[0](x)), key=key)
        return self.layers[2](x)


class Program:
    weights = ("model", "average")

    def __init__(self, inputs, num_classes, num_steps, lr=2e-3, width=64, decay=0.99):
        self.sizes, self.decay = (inputs[0], inputs[-1], width, num_classes), decay
        self.tx = optax.adamw(optax.cosine_decay_schedule(lr, num_steps))

    def init(self, key, example):
        # Arrays go into the state; what else a module has is the same in every step.
        params, self.static = eqx.partition(Network(key, *self.sizes), eqx.is_array)
        return {"model": params, "average": params, "opt": self.tx.init(params)}

    def step(self, state, batch, key):
        def mean_loss(params):
            network, keys = eqx.combine(params, self.static), jax.random.split(key, len(batch["label"]))
            logits = jax.vmap(network)(batch["inputs"], keys)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        loss, gradient = jax.value_and_grad(mean_loss)(state["model"])
        updates, opt = self.tx.update(gradient, state["opt"], state["model"])
        params = optax.apply_updates(state["model"], updates)
        average = optax.incremental_update(params, state["average"], 1 - self.decay)
        return {"model": params, "average": average, "opt": opt}, {"loss": loss, "grad_norm": optax.tree.norm(gradient)}

    def evaluate(self, state, batch):
        network = eqx.nn.inference_mode(eqx.combine(state["average"], self.static))
        logits = jax.vmap(network)(batch["inputs"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": loss, "accuracy": logits.argmax(axis=-1) == batch["label"]}
