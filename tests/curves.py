"""Curves as others read them: each reader gives, for every `split/metric`, its (step, value) pairs as they come."""

from __future__ import annotations

import json
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Curves = dict[str, list[tuple[int, float]]]


def metrics(logs: Path) -> Curves:
    """metrics.jsonl, the truth."""
    curves: Curves = defaultdict(list)
    for line in (logs / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step, split = record.pop("step"), record.pop("split")
        for name, value in record.items():
            curves[f"{split}/{name}"].append((step, value))
    return dict(curves)


def as_float32(curves: Curves) -> Curves:
    """What TensorBoard can hold of them."""
    return {
        tag: [(step, struct.unpack("f", struct.pack("f", value))[0]) for step, value in pairs]
        for tag, pairs in curves.items()
    }


def concatenated(logs: Path) -> Curves:
    """Every event of every file, in the order of names: a reader that has never heard of restarts."""
    from tensorboard.compat.proto.event_pb2 import Event

    curves: Curves = defaultdict(list)
    for path in sorted((logs / "tensorboard").glob("*tfevents*")):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            assert length, f"{path} has zeros in it"
            event = Event.FromString(content[start + 12 : start + 12 + length])
            for value in event.summary.value:
                curves[value.tag].append((event.step, value.simple_value))
            start += length + 16
        assert start == len(content), f"{path} has a torn end"
    return dict(curves)


def accumulator(logs: Path) -> Curves:
    """TensorBoard's EventAccumulator, which many scripts use."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def multiplexer(logs: Path) -> Curves:
    """What `tensorboard --load_fast=false` shows."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.util.tensor_util import make_ndarray

    events = EventMultiplexer(tensor_size_guidance={"scalars": 0})
    events.AddRunsFromDirectory(str(logs / "tensorboard"))
    events.Reload()
    ((run, kinds),) = events.Runs().items()
    return {
        tag: [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(run, tag)]
        for tag in kinds["tensors"]
    }


def data_server(logs: Path) -> Curves:
    """What `tensorboard` shows: its data server, in Rust."""
    from tensorboard.context import RequestContext
    from tensorboard.data.server_ingester import SubprocessServerDataIngester, get_server_binary
    from tensorboard.util.grpc_util import ChannelCredsType

    server = SubprocessServerDataIngester(
        get_server_binary(),
        str(logs / "tensorboard"),
        reload_interval=3600,
        channel_creds_type=ChannelCredsType.LOCAL,
        samples_per_plugin={"scalars": 0},
    )
    server.start()
    provider, context = server.data_provider, RequestContext()
    while not provider.list_runs(context, experiment_id=""):
        time.sleep(0.05)
    seen: Curves = {}
    while (now := _scalars(provider, context)) != seen or not now:  # it loads while it answers
        seen = now
        time.sleep(0.5)
    return seen


def _scalars(provider, context) -> Curves:
    runs = provider.read_scalars(context, experiment_id="", plugin_name="scalars", downsample=10**6)
    return {
        tag: [(point.step, point.value) for point in points] for tags in runs.values() for tag, points in tags.items()
    }


def wandb_offline(logs: Path) -> Curves:
    """What `wandb sync` would send, directory by directory, and that it is one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = defaultdict(list)
    numbers, ids = [], set()
    for path in sorted((logs / "wandb/wandb").glob("offline-run-*/*.wandb")):
        for content in _records(path.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                numbers.append(row["_step"])
                for tag, value in row.items():
                    if "/" in tag:
                        curves[tag].append((row["step"], value))
    assert ids == {(logs / "wandb/run_id").read_text()}
    assert numbers == list(range(len(numbers))), "wandb's own count is the number of the line"
    return dict(curves)


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log with wandb's header: blocks of 32 KiB, records in pieces (full, first, middle, last)."""
    start, record = 7, b""
    while start + 7 <= len(content):
        left = -start % 32768 or 32768
        length, kind = struct.unpack_from("<HB", content, start + 4)
        if left < 7 or kind == 0:  # padding
            start += left
            continue
        record += content[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
