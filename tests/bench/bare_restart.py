"""What a careful person would write by hand to go on with a training run, without our runner.

    python tests/bench/bare_restart.py save|go gpt|mlp FOLDER [batch]

`save` leaves a checkpoint in FOLDER, written with plain Orbax, and the compiled program in FOLDER/compiled. `go` is the
restart: imports, data, the abstract state, plain Orbax restore, the program from the cache, one step; then it prints
when that step was complete, in unix seconds. With `batch` a stored batch takes the place of the data. Imports are late,
nothing is proven, logged, locked or written, and there is no configuration.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import data
import models
from models.objectives import OBJECTIVES

what, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve()
jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

option = models.Gpt() if kind == "gpt" else models.Mlp()
choice = data.Stdlib() if kind == "gpt" else data.Digits()
inputs, num_outputs = ((128,), 256) if kind == "gpt" else ((8, 8, 1), 10)
stored = folder / "batch.npz"
if what == "go" and sys.argv[4:] == ["batch"]:
    batch = dict(np.load(stored))
else:
    batch = choice.sources().train.take(np.arange(choice.batch_size))

objective = OBJECTIVES[option.objective]
schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 20, 600, 4e-4)


def mask(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.1, mask=mask))


def make():
    return option.build(inputs, num_outputs, nnx.Rngs(0))


graphdef, abstract_params, abstract_rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)


def init():
    _, params, rest = nnx.split(make(), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    return {"step": jnp.zeros((), jnp.int32), "params": params, "rest": rest, "opt": tx.init(params)}


def step(state, batch):
    def loss_of(params):
        nnx.replace_by_pure_dict(abstract_params, params)
        nnx.replace_by_pure_dict(abstract_rest, state["rest"])
        model = nnx.merge(graphdef, abstract_params, abstract_rest, copy=True)
        loss = objective(model, batch)["loss"].mean()
        return loss, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])

    (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
    updates, opt = tx.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"step": state["step"] + 1, "params": params, "rest": rest, "opt": opt}, loss


def with_words(state):
    """Random keys as the words that Orbax can write."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


abstract = jax.eval_shape(init)
placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
checkpointer = ocp.StandardCheckpointer()
jitted = jax.jit(step, donate_argnums=0)
if what == "save":
    state = jax.jit(init)()
    state, loss = jitted(state, batch)
    checkpointer.save(folder / "state", with_words(state))
    checkpointer.wait_until_finished()
    np.savez(stored, **batch)
else:
    words = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), jax.eval_shape(with_words, abstract)
    )
    restored = checkpointer.restore(folder / "state", words)
    state = jax.tree.map(
        lambda leaf, saved: jax.random.wrap_key_data(saved) if is_key(leaf) else saved, abstract, restored
    )
state, loss = jitted(state, batch)
jax.block_until_ready((state, loss))
print(time.time(), flush=True)
