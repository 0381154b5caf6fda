"""What kind of work each operation of a compiled program is, from the program's text (HLO). Pure; imports no jax.

The name of an operation does not tell: on a CPU a `ynn_fusion`, on a GPU a `gemm_fusion`, may hold a matrix product.
What a fusion holds is written in the computation that it calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["matmul", "copy", "collective", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MODULE = re.compile(r"^HloModule ([\w.\-]+)")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
TARGET = re.compile(r'custom_call_target="([^"]*)"')

MATMULS = ("dot", "convolution", "ragged-dot")
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|send|recv)"
    r"(-start|-done)?"
)
COPIES = re.compile(r"copy(-start|-done)?|transpose|dynamic-slice|dynamic-update-slice|slice|concatenate|pad")
# They move nothing: a fusion of these and copies alone is a copy.
FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant", "reshape", "broadcast", "iota")
# Libraries' products, and kernels, by what their names have in them.
MATMUL_WORDS = re.compile(
    r"gemm|matmul|cublas|cutlass|conv|fmha|flash|attention|xmma|wgmma|(?<![a-z])dot(?![a-z])", re.IGNORECASE
)
COLLECTIVE_WORDS = re.compile(
    r"nccl|rccl|all-?_?reduce|all-?_?gather|reduce-?_?scatter|all-?_?to-?_?all", re.IGNORECASE
)
COPY_WORDS = re.compile(r"memcpy|memset|(?<![a-z])copy|transpose", re.IGNORECASE)


@dataclass(frozen=True)
class StepOperations:
    """The operations of the program, or programs, that a step is.

    Attributes:
        kinds: module → operation → what kind of work it is.
    """

    kinds: Mapping[str, Mapping[str, Kind]] = field(default_factory=dict)

    def find_kind(self, module: str, name: str) -> Kind:
        """Return the kind of an operation; `module` is the name of its program, or nothing where that is not known."""
        known = [self.kinds[module]] if module in self.kinds else [] if module else self.kinds.values()
        return next((kinds[name] for kinds in known if name in kinds), None) or classify_name(name)

    def is_foreign(self, module: str) -> bool:
        """Return whether an operation of this module is known to be none of a step: of an evaluation, of a save."""
        return bool(module and self.kinds) and module not in self.kinds


def classify_operations(text: str) -> StepOperations:
    """Return the kind of each operation of a step; `text` is the optimized HLO of its program, or of several."""
    kinds: dict[str, dict[str, Kind]] = {}
    opcodes: dict[str, list[tuple[str, str, str]]] = {}
    inside: list[tuple[str, str, str]] = []
    module = ""
    for line in [*text.splitlines(), "HloModule end"]:
        if found := MODULE.match(line):
            for name, opcode, called in [each for instructions in opcodes.values() for each in instructions]:
                kinds.setdefault(module, {})[name] = _classify(opcode, called, opcodes)
            module, opcodes = found[1], {}
        elif found := COMPUTATION.match(line):
            inside = opcodes.setdefault(found[1], [])
        elif found := INSTRUCTION.match(line):
            inside.append((found[1], *_read_instruction(found[2])))
    return StepOperations(kinds)


def classify_name(name: str) -> Kind:
    """Return the kind of an operation of which only a name is known, as of a kernel or a copy to the device."""
    if COLLECTIVE_WORDS.search(name):
        return "collective"
    if MATMUL_WORDS.search(name):
        return "matmul"
    return "copy" if COPY_WORDS.search(name) else "other"


def _read_instruction(rest: str) -> tuple[str, str]:
    """Return the operation code of an instruction, and the computation or the library function that it calls."""
    code = OPCODE.search(f" {rest}")
    opcode = code[1] if code else ""
    found = TARGET.search(rest) if opcode == "custom-call" else CALLED.search(rest)
    return opcode, found[1] if found else ""


def _classify(opcode: str, called: str, opcodes: Mapping[str, list[tuple[str, str, str]]]) -> Kind:
    if opcode in MATMULS:
        return "matmul"
    if COLLECTIVE.fullmatch(opcode):
        return "collective"
    if COPIES.fullmatch(opcode):
        return "copy"
    if opcode == "custom-call":
        return classify_name(called)
    # Calls are containers; their operations are in the trace by themselves. An asynchronous one is what it starts.
    if opcode not in ("fusion", "async-start", "async-done"):
        return "other"
    kinds = {_classify(inner, deeper, opcodes) for _, inner, deeper in opcodes.get(called, []) if inner not in FREE}
    if "matmul" in kinds:
        return "matmul"
    if "collective" in kinds:
        return "collective"
    return "copy" if kinds == {"copy"} else "other"
