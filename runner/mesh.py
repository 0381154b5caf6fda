"""Devices, and where every array lies on them. One device is a mesh of one.

A mesh has up to three axes. `data` and `fsdp` divide the batch; `fsdp` also divides the state, of which each device
then holds a part (fully sharded data parallelism; Rajbhandari et al. 2020, arXiv:1910.02054); `tensor` divides heads
and hidden units (Shoeybi et al. 2019, arXiv:1909.08053). The compiler adds what has to be sent (`AxisType.Auto`).

This is the only module that decides where an array lies: `state_shardings` for what training changes, `batch_sharding`
for what it reads. Everything else asks here, or asks an array. Where several processes train one run, each has some of
the devices, makes the rows of a batch that these need (`find_local_rows`), and lays them there (`put_local_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.types import State, Tree

if TYPE_CHECKING:
    import jax

# The axes, outermost first: neighbours, which are close to each other, share what is sent most often.
AXES = ("data", "fsdp", "tensor")
# Those that divide the batch.
BATCH_AXES = ("data", "fsdp")

# Models keep layers that are stacked for a scan under this name; their weights have one more leading dimension.
STACKED = "blocks"
# Whose devices are meant where nobody names them.
THIS_RUN = "this machine"
# An array of fewer numbers lies on every device: to send it costs more than to keep it.
MIN_DIVIDED = 4096
# Which dimension of a weight `tensor` divides, by the end of its name: of a map into heads or hidden units its outputs,
# of the map back its inputs. Below are the names of common models as well. An embedding is left to `fsdp`: divided by
# both, each lookup would gather all of it.
OUTPUTS, INPUTS = -1, -2
TENSOR_DIMENSIONS: Mapping[str, int] = {
    **dict.fromkeys(("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj"), OUTPUTS),
    **dict.fromkeys(("up", "gate", "up_proj", "gate_proj", "wi", "wi_0", "wi_1", "fc1", "c_fc", "linear1"), OUTPUTS),
    **dict.fromkeys(("head", "lm_head"), OUTPUTS),
    **dict.fromkeys(("attention.out", "attn.out", "o_proj"), INPUTS),
    **dict.fromkeys(("down", "down_proj", "wo", "fc2", "linear2"), INPUTS),
}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Say how many devices share the batch, and the state; the three multiply. One of them may be -1: what is left.

    Attributes:
        data: how many share the batch alone; each has the whole state.
        fsdp: how many share the batch and the state.
        tensor: how many share the heads and hidden units of each layer.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if (size := getattr(self, axis)) < 1 and size != -1:
                raise ValueError(f"{axis}={size} must be a number of devices, or -1 for all that are left")
        if len(rest := [axis for axis in AXES if getattr(self, axis) == -1]) > 1:
            raise ValueError(f"{rest[0]}=-1 and {rest[1]}=-1 both ask for what is left; give one of them a number")

    @property
    def is_single(self) -> bool:
        """Return whether one device does it all, whatever there are."""
        return self == Mesh()

    @property
    def num_needed(self) -> int:
        """Return how many devices it takes at least."""
        return math.prod(size for axis in AXES if (size := getattr(self, axis)) != -1)

    def build(
        self, batch_size: int | None, microbatches: int = 1, devices: Sequence[jax.Device] | None = None
    ) -> jax.sharding.Mesh:
        """Return the mesh of these devices, or of this process's; `batch_size=None`: there is no batch to divide.

        Raises ConfigError where there are too few, or where the batch does not divide evenly among them.
        """
        import jax

        owner, devices = (THIS_RUN, jax.devices()) if devices is None else ("the target", devices)
        sizes = self._fill_rest(owner, len(devices))
        parts = math.prod(sizes[axis] for axis in BATCH_AXES)
        if batch_size is not None and batch_size % (parts * microbatches):
            split = f" times train.microbatches={microbatches}" if microbatches > 1 else ""
            among = " × ".join(f"mesh.{axis}={sizes[axis]}" for axis in BATCH_AXES if sizes[axis] > 1) or "mesh.data=1"
            raise ConfigError(f"data.batch_size: got {batch_size}; it must divide evenly among {among} devices{split}")
        if owner == THIS_RUN and parts * sizes["tensor"] < len(devices) and jax.process_count() > 1:
            # Each process takes part in every computation, by a device of its own.
            raise ConfigError(
                f"mesh: {parts * sizes['tensor']} of the {len(devices)} devices of {jax.process_count()} processes, "
                "each of which has to take part; use mesh=data, mesh=fsdp, or a size of -1"
            )
        # An axis of one divides nothing: without it the program is the one it has always been.
        axes = {axis: size for axis, size in sizes.items() if size > 1} or {"data": 1}
        return jax.make_mesh(
            tuple(axes.values()),
            tuple(axes),
            (jax.sharding.AxisType.Auto,) * len(axes),
            devices=devices[: math.prod(axes.values())],
        )

    def _fill_rest(self, owner: str, count: int) -> dict[str, int]:
        """Return the size of every axis, for so many devices of `owner`. Raises ConfigError where these are too few."""
        sizes = {axis: int(getattr(self, axis)) for axis in AXES}
        asked = self.num_needed
        for axis, size in sizes.items():
            if size == -1:
                sizes[axis] = count // asked
        if asked > count:
            named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
            raise ConfigError(
                f"{named}: {asked} devices in all; {owner} has {count} device(s); use -1 for what is left"
            )
        return sizes


def state_shardings(
    mesh: jax.sharding.Mesh, abstract_state: State, declared: Mapping[str, tuple[Any, ...]] | None = None
) -> Tree:
    """Return a tree like the state with the sharding of every leaf.

    `tensor` first, by name; then `fsdp` on the largest dimension that is left and divides, never on that of stacked
    layers (each step of a scan would gather all of them). What an optimizer keeps for a weight, and an average of it,
    have its name at their end, and so lie as it does.

    Args:
        mesh: the devices.
        abstract_state: the shape and type of each array.
        declared: by the name of a weight, the axes of its dimensions as the user's own model says them: they win.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return replicated_sharding(mesh)
        own = _find_declared(names, declared or {})
        axes = choose_axes(names, leaf.shape, mesh.shape) if own is None else _keep_axes(own, leaf.shape, mesh.shape)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def choose_axes(names: Sequence[str], shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[str | None, ...]:
    """Return for each dimension of an array the axis that divides it, or None; no axis at all for a small array.

    Args:
        names: the keys that lead to it, as `("params", "blocks", "ffn", "up", "kernel")`.
        shape: its dimensions.
        sizes: how many devices each axis of the mesh has.
    """
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) < MIN_DIVIDED:
        return ()
    first = int(_is_stacked(names))
    dimension = _find_tensor_dimension(names, len(shape), first)
    if dimension is not None and sizes.get("tensor", 1) > 1 and shape[dimension] % sizes["tensor"] == 0:
        axes[dimension] = "tensor"
    count = sizes.get("fsdp", 1)
    free = [at for at in range(first, len(shape)) if axes[at] is None and shape[at] % count == 0]
    if count > 1 and free:
        axes[max(free, key=lambda at: shape[at])] = "fsdp"
    return tuple(axes) if any(axes) else ()


def _is_stacked(names: Sequence[str]) -> bool:
    """Return whether the leading dimension of an array counts layers; a list of blocks has its place as a name."""
    if STACKED not in names:
        return False
    after = names[list(names).index(STACKED) + 1 :]
    return bool(after) and not after[0].isdecimal()


def _find_tensor_dimension(names: Sequence[str], ndim: int, first: int) -> int | None:
    """Return the dimension that `tensor` divides; None where it divides none."""
    *modules, kind = names
    if not modules:
        return None
    path = ".".join(modules)
    found = next((at for end, at in TENSOR_DIMENSIONS.items() if path == end or path.endswith(f".{end}")), None)
    if found is None or kind not in ("kernel", "bias", "weight") or ndim - first < 1:
        return None
    if kind == "bias" or ndim - first == 1:
        # What is added to the outputs is divided as they are.
        return ndim - 1 if found == OUTPUTS else None
    return ndim + found


def _find_declared(names: Sequence[str], declared: Mapping[str, tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """Return what a model says of the weight whose name is at the end of these names."""
    for start in range(len(names)):
        if (found := declared.get(".".join(names[start:]))) is not None:
            return found
    return None


def _keep_axes(own: tuple[Any, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """Return the axes that a model states, as far as this mesh has them and they divide the dimension."""
    # What an optimizer keeps for a weight may have other dimensions (a row of second moments).
    if len(own) > len(shape):
        return ()
    kept = []
    for axes, length in zip(own, shape, strict=False):
        names = [name for name in (axes if isinstance(axes, tuple) else (axes,)) if sizes.get(name, 1) > 1]
        fits = names and length % math.prod(sizes[name] for name in names) == 0
        kept.append((names[0] if len(names) == 1 else tuple(names)) if fits else None)
    return tuple(kept) if any(kept) else ()


def replicated_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Return the sharding of a value that every device holds whole."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Return the sharding of a batch: its leading dimension is divided along `data` and `fsdp`."""
    from jax.sharding import NamedSharding, PartitionSpec

    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(axes[0] if len(axes) == 1 else axes) if axes else PartitionSpec())


def is_local(mesh: jax.sharding.Mesh) -> bool:
    """Return whether every device of a mesh is this process's own."""
    return replicated_sharding(mesh).is_fully_addressable


def find_local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> slice:
    """Return the rows of a batch that the devices of this process need under `batch_sharding`.

    They are the smallest range that holds every row needed: all rows, where all devices are its own.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    needed = [index[0].indices(batch_size) for index in indices if index is not None]
    # Whoever has none of the devices trains nothing, and only looks at what a run would be.
    if not needed:
        return slice(0, batch_size)
    return slice(min(start for start, _, _ in needed), max(stop for _, stop, _ in needed))


def put_local_rows(mesh: jax.sharding.Mesh, batch_size: int, tree: Tree) -> Tree:
    """Lay a batch on the devices as `batch_sharding` says, and return it as arrays of `batch_size` rows.

    The leaves of `tree` have the rows of `find_local_rows` alone. Nothing is sent from one process to another.

    Raises ValueError where a leaf has another number of rows, and some devices are those of other processes.
    """
    import jax

    sharding = batch_sharding(mesh)
    if is_local(mesh):
        return jax.device_put(tree, sharding)
    rows = find_local_rows(mesh, batch_size)

    # Not `jax.device_put`: it would have all processes compare what they give, each time.
    def put(leaf: Any) -> jax.Array:
        # A whole batch would be cut at the wrong places, and nobody would see it.
        if len(leaf) != rows.stop - rows.start:
            raise ValueError(f"a batch has {len(leaf)} rows here; expected rows {rows.start} to {rows.stop} of it")

        def take(index: Any) -> Any:
            start, stop, _ = index[0].indices(batch_size)
            return leaf[start - rows.start : stop - rows.start]

        return jax.make_array_from_callback((batch_size, *leaf.shape[1:]), sharding, take)

    return jax.tree.map(put, tree)


def put_whole(mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
    """Lay what every process has whole on every device. Nothing is sent from one process to another."""
    import jax

    sharding = replicated_sharding(mesh)
    if is_local(mesh):
        return jax.device_put(tree, sharding)
    # Not `jax.device_put`: it would have all processes compare what they give, each time.
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]), tree
    )


def activation_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding | None:
    """Return how activations are divided between blocks; None where the compiler is told nothing.

    With a whole state on each device it finds that by itself.
    """
    return batch_sharding(mesh) if mesh.shape.get("fsdp", 1) > 1 or mesh.shape.get("tensor", 1) > 1 else None


def describe_mesh(mesh: jax.sharding.Mesh) -> str:
    """Return ` (data 2 × fsdp 4, 2 processes)`: axes, where not `data` alone; processes, where several."""
    axes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    processes = len({device.process_index for device in mesh.devices.flat})
    named = " × ".join(f"{axis} {size}" for axis, size in axes.items()) if axes.keys() - {"data"} else ""
    told = ", ".join(filter(None, [named, f"{processes} processes" if processes > 1 else ""]))
    return f" ({told})" if told else ""


def bytes_per_device(tree: Tree) -> int:
    """Return how many bytes of a tree of arrays, abstract or real, lie on one device, as their shardings say."""
    import jax

    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def batch_share(mesh: jax.sharding.Mesh, num_bytes: int) -> int:
    """Return how many of the bytes that grow with the batch (activations) lie on one device."""
    return num_bytes // math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def _shard_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
