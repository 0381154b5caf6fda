"""`tokenize`: write text files as token files, which `data=tokens` maps into memory; in parallel."""

from __future__ import annotations

import os
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from data.encodings import EncodingChoice
from data.token_writer import find_documents, write_token_files
from runner.errors import ConfigError
from runner.text import format_size, quote_override
from runner.values import Say, VerbResult

# The line of progress is drawn at most so often.
REDRAW_SECONDS = 0.5


def add_arguments(parser: ArgumentParser) -> None:
    """Add the files, where their tokens go, and how text becomes tokens."""
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="a text file, or a folder of them, compressed or not; a file is a document, of JSON each object",
    )
    parser.add_argument("--to", metavar="DIR", required=True, help="a directory that is new, or empty")
    parser.add_argument(
        "--encoding", default="bytes", help="bytes (the default), tokenizers:FILE.json or tiktoken:NAME"
    )
    parser.add_argument(
        "--pattern", default="**/*.txt", help="which files of a folder; '**/*.txt' unless said otherwise"
    )
    parser.add_argument("--field", help="which field of JSON is the text; 'text' unless said otherwise")
    parser.add_argument("--eval-fraction", type=float, default=0.05, help="share of the documents to evaluate on; 0.05")
    parser.add_argument("--no-eos", action="store_true", help="put no token between documents")
    parser.add_argument("--workers", type=int, help="processes: one a core, but one for bytes, which are faster read")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Tokenize, and say what came of it. Raises ConfigError where there is nothing to read, or DIR is not empty."""
    # Bytes are read faster by one process than they are handed from one to another.
    workers = arguments.workers or (1 if arguments.encoding == "bytes" else os.cpu_count() or 1)
    if not 0.0 < arguments.eval_fraction < 1.0 or workers < 1:
        raise ConfigError("tokenize: --eval-fraction is between 0 and 1, and --workers 1 or more")
    target, began = Path(arguments.to).expanduser(), time.monotonic()
    try:
        paths = [Path(path).expanduser() for path in arguments.paths]
        everything = find_documents(paths, arguments.pattern, arguments.field)
        # What is to test on is in neither file: it could be trained on by mistake.
        documents = [document for document in everything if document.part != "test"]
        header = write_token_files(
            documents,
            target,
            EncodingChoice(arguments.encoding, has_eos=not arguments.no_eos),
            eval_fraction=arguments.eval_fraction,
            workers=workers,
            progress=ProgressLine(len(documents)),
        )
    except ValueError as error:
        raise ConfigError(_name_flags(str(error))) from None
    seconds = time.monotonic() - began
    if tests := [document.name for document in everything if document.part == "test"]:
        say(f"left out: {len(tests)} to test on ({tests[0]}{', …' if len(tests) > 1 else ''}); tokenize it by itself")
    text_bytes = header.train.text_bytes + header.eval.text_bytes
    tokens = header.train.tokens + header.eval.tokens
    say(
        f"{target}  {header.train.tokens:,} + {header.eval.tokens:,} tokens (train + eval) of {header.encoding}, "
        f"vocabulary {header.vocab_size:,}, from {header.train.documents + header.eval.documents:,} documents "
        f"({format_size(text_bytes)})"
    )
    say(
        f"{seconds:.1f} s, {format_size(int(text_bytes / max(seconds, 1e-9)))}/s, "
        f"{text_bytes / max(tokens, 1):.2f} bytes a token; "
        f"train on it: python run.py data=tokens {quote_override('data.path', str(target))}"
    )
    return VerbResult({"path": str(target), "seconds": round(seconds, 3), **asdict(header)})


def _name_flags(message: str) -> str:
    """Return what is said of a data option as it is said of this verb, whose options are flags."""
    message = re.sub(r"^path=(.*?) holds", r"\1: holds", message).removeprefix("path=")
    message = re.sub(r"matches pattern=([^;]*)", r"matches --pattern '\1'", message)
    for key in ("pattern", "field"):
        message = message.replace(f"data.{key}=", f"--{key} ").replace(f"data.{key}", f"--{key}")
    message = message.replace(", or name data.path and data.eval_path", "")
    return re.sub(r"^field(=\S+)?:? ", r"--field\1: ", message)


class ProgressLine:
    """One line on a terminal that tells how many files are done; nothing where stderr is no terminal."""

    def __init__(self, num_files: int):
        self._num_files, self._drawn = num_files, time.monotonic()

    def __call__(self, done: int, tokens: int) -> None:
        """Draw the line anew: `done` files, which gave `tokens` tokens."""
        now = time.monotonic()
        if not sys.stderr.isatty():
            return
        # The last one is always drawn: it stays.
        if now - self._drawn < REDRAW_SECONDS and done < self._num_files:
            return
        self._drawn = now
        end = "\n" if done == self._num_files else ""
        line = f"\r{done:,} of {self._num_files:,} files, {tokens:,} tokens"
        print(line, end=end, file=sys.stderr, flush=True)
