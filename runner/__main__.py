"""Look at what runs left behind, check it and use it: `python -m runner VERB …`.

Each verb is a module of its own (`runner.values.Verb` says what it has), imported when it is asked for: looking at a
run waits for nothing it does not need. A mistake of the user is one plain line and an exit code of the contract, as in
run.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, cast

from runner.config.explain import suggest_word
from runner.errors import ConfigError, HoldfastError, RefusedError, StorageError
from runner.files import NOT_A_FILE, format_json
from runner.installation import keep_own_packages_first
from runner.screen import prepare_screen, print_error
from runner.text import mask_lines, mask_unprintable
from runner.values import Verb

EXIT_INTERRUPTED, EXIT_PIPE = 130, 141

# verb → its module below `runner`, and one line of help
VERBS: dict[str, tuple[str, str]] = {
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
    "restore": ("inspect.restore_checkpoint", "take back a checkpoint that was set aside, after proving every byte"),
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
    """A parser whose complaints are one plain line, as those of everything else."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError where argparse would print its usage and exit."""
        raise ConfigError(f"{self.prog.split()[-1]}: {message}; {self.prog} --help says what it takes")


def run_console_script() -> NoReturn:
    """Be the command `holdfast`: a verb where the first word is one, else `python run.py`."""
    words = sys.argv[1:]
    # No override of a run is a plain word: one that is no verb either is better compared with the verbs.
    if words and words[0].isidentifier():
        sys.exit(run_from_shell(words))
    # Imported for a run alone, as a verb is when it is asked for.
    from runner.launch.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()
    keep_own_packages_first()
    import runner.launch.main

    runner.launch.main.exit_process(runner.launch.main.main(words))


def run_from_shell(words: Sequence[str]) -> int:
    """Do what the words after `python -m runner` say, for a process that ends with the exit code that is returned."""
    prepare_screen()
    keep_own_packages_first()
    try:
        return main(words)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def main(words: Sequence[str]) -> int:
    """Do what the words after `python -m runner` say; return the exit code. Errors are said on stderr."""
    try:
        code = _answer(words)
        sys.stdout.flush()
    except HoldfastError as error:
        # A message quotes what lies on a disk.
        print_error(mask_lines(f"error: {error}"))
        return error.exit_code
    except BrokenPipeError:
        # Whoever was reading has seen enough. Python flushes stdout when it ends: that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        print_error(mask_lines(f"error: {error.filename or 'storage'}: {error.strerror or error}"))
        # A link or a pipe in the place of a file is no trouble of the disk: somebody has put it there.
        return RefusedError.exit_code if error.errno in NOT_A_FILE else StorageError.exit_code
    return code


def format_overview() -> str:
    """Return the help: the verbs, one line each."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "python -m runner VERB …",
            "",
            *lines,
            "",
            "RUN is outputs/NAME/RUN, or s3://BUCKET/PREFIX/NAME/RUN (also gs://, az://, file://) to look at it there;",
            "a checkpoint is RUN@STEP, RUN@best or RUN@newest (the same as RUN).",
            "--json prints the same facts as data; VERB --help says more.",
        ]
    )


def _answer(words: Sequence[str]) -> int:
    """Print the overview where no verb is asked for, else do what the verb does. Return the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(format_overview())
        return 0 if words else ConfigError.exit_code
    try:
        return _run_named_verb(words[0], words[1:])
    except SystemExit as answered:
        # argparse has printed the help of a verb: what is still in a buffer may have no reader, either.
        return answered.code if isinstance(answered.code, int) else 0


def _run_named_verb(name: str, words: Sequence[str]) -> int:
    if name not in VERBS:
        near = suggest_word(name, list(VERBS)) or f"; there are: {', '.join(VERBS)}"
        if "=" in name:
            near = "; a run is started by holdfast or python run.py, with the same words"
        raise ConfigError(f"unknown verb '{name}'{near}")
    module, what = VERBS[name]
    verb = cast(Verb, importlib.import_module(f"runner.{module}"))
    parser = VerbParser(prog=f"python -m runner {name}", description=f"{what[0].upper()}{what[1:]}.")
    verb.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    # For a module of two verbs: it asks which one was typed.
    parser.set_defaults(verb=name)
    arguments = parser.parse_args(list(words))
    result = verb.run_verb(arguments, _say_nothing if arguments.json else _print_line)
    if arguments.json:
        print(_escape_unprintable(format_json(result.document, indent=1, ensure_ascii=False)))
    return result.exit_code


def _say_nothing(line: str) -> None:
    """Take a line for people, and drop it."""


def _print_line(line: str) -> None:
    """Print a line at once: the next one may take a while."""
    # Names and reasons come from a disk, and must not command the terminal: a control character is shown as a dot.
    print(mask_unprintable(line), flush=True)


def _escape_unprintable(document: str) -> str:
    """Return a JSON text that commands no terminal: JSON itself escapes the control characters of ASCII alone."""
    if document.replace("\n", "").isprintable():
        return document
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in document)


if __name__ == "__main__":
    sys.exit(run_from_shell(sys.argv[1:]))
