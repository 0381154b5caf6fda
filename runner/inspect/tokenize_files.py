"""`tokenize`: text files become token files that `data=tokens` maps, in parallel."""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from runner.errors import ConfigError
from runner.text import format_size
from runner.values import Answer, Say

REPORT_SECONDS = 0.5


def arguments(parser: ArgumentParser) -> None:
    """Files or folders, where to, and how."""
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="a text file, or a folder of them; a file is a document"
    )
    parser.add_argument("--to", metavar="DIR", required=True, help="a directory that is new, or empty")
    parser.add_argument(
        "--encoding", default="bytes", help="bytes (the default), tokenizers:FILE.json or tiktoken:NAME"
    )
    parser.add_argument(
        "--pattern", default="**/*.txt", help="which files of a folder; '**/*.txt' unless said otherwise"
    )
    parser.add_argument("--eval-fraction", type=float, default=0.05, help="share of the documents to evaluate on; 0.05")
    parser.add_argument("--no-eos", action="store_true", help="put no token between documents")
    parser.add_argument("--workers", type=int, help="processes: one a core, but one for bytes, which are faster read")


def run(arguments: Namespace, say: Say) -> Answer:
    """Tokenize. Raises ConfigError where there is nothing to read, or DIR is not empty."""
    from data.token_files import find_documents, write_token_files

    workers = arguments.workers or (1 if arguments.encoding == "bytes" else os.cpu_count() or 1)
    if not 0.0 < arguments.eval_fraction < 1.0 or workers < 1:
        raise ConfigError("tokenize: --eval-fraction is between 0 and 1, and --workers 1 or more")
    target, began = Path(arguments.to).expanduser(), time.monotonic()
    try:
        documents = find_documents([Path(path).expanduser() for path in arguments.paths], arguments.pattern)
        header = write_token_files(
            documents,
            target,
            arguments.encoding,
            eos=not arguments.no_eos,
            eval_fraction=arguments.eval_fraction,
            workers=workers,
            progress=ProgressLine(len(documents)),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    seconds, sides = time.monotonic() - began, (header.train, header.eval)
    text, tokens = sum(side.text_bytes for side in sides), sum(side.tokens for side in sides)
    say(
        f"{target}  {header.train.tokens:,} + {header.eval.tokens:,} tokens (train + eval) of {header.encoding}, "
        f"vocabulary {header.vocab_size:,}, from {len(documents):,} documents ({format_size(text)})"
    )
    say(
        f"{seconds:.1f} s, {format_size(int(text / max(seconds, 1e-9)))}/s, {text / max(tokens, 1):.2f} bytes a token; "
        f"train on it: python run.py data=tokens data.path={target}"
    )
    return Answer({"path": str(target), "seconds": round(seconds, 3), **asdict(header)})


class ProgressLine:
    """One line that a terminal shows anew now and then; nothing where there is none."""

    def __init__(self, documents: int):
        self._documents, self._told = documents, time.monotonic()

    def __call__(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self._told < REPORT_SECONDS and done < self._documents):
            return
        self._told = now
        end = "\n" if done == self._documents else ""
        print(f"\r{done:,} of {self._documents:,} documents, {tokens:,} tokens", end=end, file=sys.stderr, flush=True)
