"""A Flax Linen CNN with batch normalization and its `TrainState`, on digits."""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax.training import train_state


class Cnn(nn.Module):
    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, x, train):
        for features in (self.width, 2 * self.width):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


class Program:
    def __init__(self, num_classes, num_steps, lr=3e-3, width=32):
        self.model = Cnn(num_classes, width)
        self.tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, lr, num_steps // 20, num_steps))

    def init(self, key, example):
        made = self.model.init(key, example["inputs"], train=False)
        return TrainState.create(
            apply_fn=self.model.apply, params=made["params"], batch_stats=made["batch_stats"], tx=self.tx
        )

    def step(self, state, batch, key):
        def mean_loss(params):
            logits, changed = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                *(batch["inputs"], True),
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), changed["batch_stats"]

        (loss, batch_stats), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradient, batch_stats=batch_stats), {"loss": loss}

    def evaluate(self, state, batch):
        logits = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, batch["inputs"], False)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": loss, "accuracy": logits.argmax(axis=-1) == batch["label"]}
