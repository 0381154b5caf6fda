"""What runs left behind, looked at, checked and used: `python -m runner VERB …`.

Each verb is a module of its own, imported when it is asked for: looking at a run waits for nothing it does not need.
A mistake of the user is one plain line and an exit code of the contract, as in run.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from runner.errors import ConfigError, HoldfastError

EXIT_STORAGE, EXIT_INTERRUPTED, EXIT_PIPE = 5, 130, 141

# verb → the module of runner that does it, and one line of help
VERBS = {
    "ls": ("inspect.ls_runs", "the checkpoints of a run, or the runs of a directory"),
    "show": ("inspect.show_checkpoint", "one checkpoint: why, when, what was measured, every array"),
    "diff": (
        "inspect.diff_checkpoints",
        "what differs between two checkpoints; exit 0 where nothing does, 1 where something does",
    ),
    "verify": ("inspect.verify_checkpoint", "whether every byte is the one that was written; exit 3 where not"),
    "why": ("inspect.why_restart", "which checkpoint a restart would use, and why not a newer one"),
    "pin": ("inspect.pin_checkpoint", "keep a checkpoint, whatever retention says"),
    "unpin": ("inspect.pin_checkpoint", "leave a checkpoint to retention again"),
    "prune": ("inspect.prune_checkpoints", "delete now what retention lets go"),
    "digest": ("inspect.digest_checkpoint", "one SHA-256 of what a checkpoint means, however it was written"),
    "export": ("inspect.export_weights", "the weights alone, as safetensors or npz, with a model card"),
    "eval": ("inspect.eval_checkpoint", "what the evaluations of a run, or others, measure on one of its checkpoints"),
    "model": (
        "inspect.model_table",
        "what a model costs, part by part: parameters, FLOPs, stored bytes; key=value as for run.py",
    ),
    "remat": (
        "inspect.remat_table",
        "what each way to recompute costs, for your model and batch: memory, FLOPs, time; a picture",
    ),
    "supervise": (
        "launch.supervise",
        "run a command again until it is done: after stops, and within a budget after crashes",
    ),
    "recipe": ("launch.recipe", "what makes a scheduler run it again: Slurm, Kubernetes, SkyPilot, systemd"),
    "tokenize": ("inspect.tokenize_files", "text files become token files for data=tokens, in parallel"),
    "drill": (
        "drill.drill_verb",
        "a configuration untouched and again while it is killed: every bit compared; exit 1 where not",
    ),
    "report": (
        "report.report_verb",
        "one page of HTML about runs: what differs, scores, curves, checkpoints, interruptions, time",
    ),
    "goodput": (
        "inspect.goodput_table",
        "where the wall-clock of all attempts went: progress, start-up, saving, lost, down; money",
    ),
}


class VerbParser(argparse.ArgumentParser):
    """Complains in one plain line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{self.prog.split()[-1]}: {message}; {self.prog} --help says what it takes")


def main(words: Sequence[str]) -> int:
    """Do what the verb says. Gives the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(format_overview())
        return 0 if words else ConfigError.exit_code
    try:
        code = _done(words[0], words[1:])
        sys.stdout.flush()
    except HoldfastError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever was reading has seen enough; the interpreter must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        print(f"error: {error.filename or 'storage'}: {error.strerror or error}", file=sys.stderr)
        return EXIT_STORAGE
    return code


def format_overview() -> str:
    """The verbs, one line each."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "python -m runner VERB …",
            "",
            *lines,
            "",
            "RUN is outputs/NAME/RUN; a checkpoint is RUN@STEP, RUN@best or RUN@newest (the same as RUN).",
            "--json prints the same facts as data; VERB --help says more.",
        ]
    )


def _done(verb: str, words: Sequence[str]) -> int:
    if verb not in VERBS:
        from runner.config.explain import suggest_word

        near = suggest_word(verb, list(VERBS)) or f"; there are: {', '.join(VERBS)}"
        raise ConfigError(f"unknown verb '{verb}'{near}")
    name, what = VERBS[verb]
    tool = importlib.import_module(f"runner.{name}")
    parser = VerbParser(prog=f"python -m runner {verb}", description=f"{what[0].upper()}{what[1:]}.")
    tool.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.set_defaults(verb=verb)
    arguments = parser.parse_args(list(words))
    answer = tool.run(arguments, (lambda line: None) if arguments.json else _say)
    if arguments.json:
        print(json.dumps(_strict(answer.document), indent=1, ensure_ascii=False))
    return answer.exit_code


def _say(line: str) -> None:
    """Print at once: what is checked may be large. Names and reasons from disk must not command a terminal."""
    print("".join(char if char.isprintable() else "·" for char in line), flush=True)


def _strict(value: Any) -> Any:
    """A value without the numbers that JSON does not have; they become the words "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without an arrow gets a question mark
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
