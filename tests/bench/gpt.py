"""Throughput of a GPT of 124 M parameters in bfloat16: tokens a second, % of the device's peak, peak memory.

    python -m tests.bench.gpt --peak 989        (an H100's or H200's dense bfloat16 TFLOP/s, from its data sheet)
    python -m tests.bench.gpt --small           (a shrunken form for a CPU, to see that it runs; its numbers say nothing)

The shape of experiment=gpt2_124m, a batch of --batch sequences of 1024 tokens an update, by remat policy and attention,
and the same shape written in plain PyTorch with torch.compile where torch is installed. All in one process and in
turns: a round is one segment of updates of each, a number is the median over the rounds, after one segment each that
compiles and warms up. The clock stops when the device has finished. Ours donates its state, and all variants share it.

% of peak: the FLOPs of the model (forward and backward, attention in full, without what is computed again; Chowdhery
et al. 2022, arXiv:2204.02311, appendix B) ÷ time ÷ peak. Peak memory is each variant's in a process of its own, since a
device never forgets its highest mark; a variant that does not fit is said not to.

Results: not measured on GPU. With --small on a CPU it runs; nothing more is known.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

VARIANTS: dict[str, tuple[dict[str, Any], str, int]] = {  # remat, attention, loss_chunks
    "none": ({"kind": "none"}, "xla", 1),
    "none, 8 chunks": ({"kind": "none"}, "xla", 8),
    "dots_no_batch": ({"kind": "dots_no_batch"}, "xla", 1),
    "attention_only": ({"kind": "attention_only"}, "xla", 1),
    "full": ({"kind": "full"}, "xla", 1),
    "cudnn": ({"kind": "none"}, "cudnn", 1),
    "cudnn, 8 chunks": ({"kind": "none"}, "cudnn", 8),
    "cudnn, dots_no_batch": ({"kind": "dots_no_batch"}, "cudnn", 1),
    "cudnn, full": ({"kind": "full"}, "cudnn", 1),
    "cudnn, full, 8 chunks": ({"kind": "full"}, "cudnn", 8),
    "cudnn, offload qkv": ({"kind": "offload", "offload": ["qkv"], "save": ["attn_ctx", "ffn_pre"]}, "cudnn", 1),
}
TORCH = "torch.compile"
OPTIM = {"lr": 6e-4, "b2": 0.95, "weight_decay": 0.1}
Segment = Callable[[int], float]  # number of updates → seconds


@dataclass(frozen=True)
class Shape:
    """GPT-2's smallest form, or one that a CPU can do."""

    num_layers: int = 12
    num_heads: int = 12
    width: int = 768
    vocab: int = 50257
    seq_len: int = 1024
    batch_size: int = 32

    @property
    def hidden(self) -> int:
        return 4 * self.width


SMALL = Shape(num_layers=2, num_heads=4, width=64, vocab=512, seq_len=64, batch_size=4)


def built(shape: Shape, name: str) -> Any:
    """Our train step for a variant, traced under its plan for real token ids."""
    from runner.config.schema import validate_config
    from runner.train.build import build

    remat, attention, chunks = VARIANTS[name]
    sizes = {"num_layers": shape.num_layers, "num_heads": shape.num_heads, "width": shape.width}
    form = {"activation": "gelu", "norm": "layernorm", "positions": "learned", "biases": True, "norm_epsilon": 1e-5}
    model = {"kind": "gpt", **sizes, **form, "hidden": shape.hidden, "attention": attention, "loss_chunks": chunks}
    data = {"kind": "synthetic", "seq_len": shape.seq_len, "batch_size": shape.batch_size, "size": shape.batch_size}
    document = {"model": model, "data": data, "optim": {"kind": "adamw", **OPTIM}, "remat": remat}
    document |= {"schedule": {"kind": "constant"}, "train": {"precision": "bf16"}}
    document |= {"ckpt": {}, "retention": {}, "mesh": {}, "preempt": {}, "log": {}, "score": {}}
    config = validate_config(document)
    return build(config, replace(config.data.sources(), num_outputs=shape.vocab))


def traced(shape: Shape, name: str) -> Any:
    import jax
    import jax.numpy as jnp

    from models.scopes import use_plan

    ours = built(shape, name)
    with use_plan(ours.plan):
        batch = {"tokens": jax.ShapeDtypeStruct((shape.batch_size, shape.seq_len + 1), jnp.int32)}
        return ours, ours.train_step.trace(ours.abstract, batch)


class Ours:
    """The state that all variants pass on to each other, and a batch that lies on the device."""

    def __init__(self, shape: Shape):
        import jax

        self.shape, self.state = shape, None
        key, size = jax.random.key(0), (shape.batch_size, shape.seq_len + 1)
        self.batch = {"tokens": jax.random.randint(key, size, 0, shape.vocab)}

    def segment(self, name: str) -> Segment:
        """A compiled variant. Raises RuntimeError where it does not fit into memory, ConfigError where it cannot be."""
        import jax

        ours, trace = traced(self.shape, name)
        step = ours.train_step.with_lr(trace.lower().compile())
        if self.state is None:
            self.state = ours.init()

        def run(num_steps: int) -> float:
            start = time.perf_counter()
            try:
                for _ in range(num_steps):
                    self.state, metrics = step(self.state, self.batch)
                jax.block_until_ready((self.state, metrics))
            except jax.errors.JaxRuntimeError:
                self.state = ours.init()  # what was donated is gone
                raise
            return time.perf_counter() - start

        return run


def torch_segment(shape: Shape) -> Segment:
    """The same model, loss, clipping and optimizer, in plain PyTorch."""
    import torch
    import torch.nn.functional as functional
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_attention, self.norm_ffn = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
            self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
            self.up, self.down = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)

        def forward(self, x: Any) -> Any:
            batch, seq, width = x.shape
            heads = self.qkv(self.norm_attention(x)).view(batch, seq, 3, shape.num_heads, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, width))
            return x + self.down(functional.gelu(self.up(self.norm_ffn(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Embedding(shape.vocab, shape.width), nn.Embedding(1024, shape.width)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.num_layers))
            self.norm = nn.LayerNorm(shape.width)
            for weights in (self.embed.weight, self.positions.weight):
                nn.init.normal_(weights, std=0.02)

        def forward(self, tokens: Any) -> Any:
            x = self.embed(tokens[:, :-1]) + self.positions.weight[: shape.seq_len]
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.embed.weight.T
            return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    model = Gpt().to(device)
    compiled = torch.compile(model)
    decays = {"lr": OPTIM["lr"], "betas": (0.9, OPTIM["b2"]), "weight_decay": OPTIM["weight_decay"]}
    optim = torch.optim.AdamW(model.parameters(), **decays, fused=device == "cuda")
    tokens = torch.randint(0, shape.vocab, (shape.batch_size, shape.seq_len + 1), device=device)

    def run(num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            optim.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                loss = compiled(tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optim.step()
        if device == "cuda":
            torch.cuda.synchronize()
        else:
            loss.item()
        return time.perf_counter() - start

    return run


def peak_bytes(shape: Shape, name: str) -> int | None:
    """What the device held at most, after three updates of one variant in this process; None: it does not tell."""
    if name == TORCH:
        import torch

        torch_segment(shape)(3)
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    import jax

    Ours(shape).segment(name)(3)
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def told(error: Exception) -> str:
    text = str(error).splitlines()[0]
    return "does not fit" if "RESOURCE_EXHAUSTED" in text or "out of memory" in text else text[:90]


def names() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        print(f"{TORCH}: skipped, torch is not installed", flush=True)
        return list(VARIANTS)
    return [*VARIANTS, TORCH]


def peaks(arguments: list[str]) -> dict[str, str]:
    """Each variant in a process of its own, before this one holds the device."""
    found = {}
    for name in names():
        command = [sys.executable, "-m", "tests.bench.gpt", *arguments, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        answer = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        found[name] = "not told" if answer is None else f"{answer / 2**30:.1f} GiB"
    return found


def measured(shape: Shape, num_steps: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds for an update of each variant that can be had, by round."""
    from runner.errors import ConfigError

    ours, segments = Ours(shape), {}
    for name in names():
        try:
            segment = torch_segment(shape) if name == TORCH else ours.segment(name)
            segment(num_steps)
        except (RuntimeError, ConfigError) as error:
            print(f"{name}: {told(error)}", flush=True)
            continue
        segments[name] = segment
    found: dict[str, list[float]] = {name: [] for name in segments}
    for number in range(num_rounds):
        order = list(segments)
        for name in order[number % len(order) :] + order[: number % len(order)]:  # nobody is always first
            found[name].append(segments[name](num_steps) / num_steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a shrunken form, for a CPU")
    parser.add_argument("--batch", type=int, help="sequences an update (32)")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="updates in a segment")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak memory as well: a process for each variant")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some of the memory
    shape = SMALL if given.small else Shape()
    shape = replace(shape, batch_size=given.batch or shape.batch_size)
    if given.only:
        print(json.dumps(peak_bytes(shape, given.only)))
        return
    memory = peaks([f"--batch={shape.batch_size}", *(["--small"] if given.small else [])]) if given.memory else {}

    import jax

    from runner.trace.flops import count_flops

    flops, tokens = count_flops(traced(shape, "none")[1].jaxpr.jaxpr), shape.batch_size * shape.seq_len
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {shape.batch_size} × {shape.seq_len} tokens an update"
    )
    print(f"{flops / tokens / 1e6:.1f} MFLOP a token", flush=True)
    found = measured(shape, given.steps, given.rounds)
    print(f"{'':<24}{'ms':>9}{'[min - max]':>20}{'tokens/s':>12}{'% of peak':>11}{'peak memory':>14}")
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        share = f"{100 * flops / middle / given.peak / 1e12:.1f}" if given.peak else "-"
        spread = f"[{min(seconds) * 1e3:.2f} - {max(seconds) * 1e3:.2f}]"
        print(
            f"{name:<24}{middle * 1e3:>9.2f}{spread:>20}{tokens / middle:>12,.0f}{share:>11}{memory.get(name, '-'):>14}"
        )


if __name__ == "__main__":
    main()
