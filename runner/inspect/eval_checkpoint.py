"""`eval`: measure on one checkpoint what the evaluations of its run measure, or others that are named here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from runner.config.trust import TRUST_FLAG
from runner.errors import ConfigError
from runner.inspect.lookup import choose_new_folder, find_checkpoint, is_in_bucket
from runner.launch.compose import compose_run
from runner.text import format_override
from runner.values import Say, VerbResult

# Keys that this verb sets itself.
RESERVED_KEYS = ("dir", "step", "train.steps", "resume", "overwrite")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the checkpoint, and what is to be different from the run's own configuration."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named; often RUN@best")
    parser.add_argument(TRUST_FLAG, action="store_true", help="import the code that the run names as its own")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as eval=[metrics,text] train.eval_batches=100"
    )


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Evaluate, and say what was measured; it is written to `eval/STEP/` of the run, whose other files are only read.

    Of a run in a bucket nothing is written there, but to a new folder `outputs/.eval/TIME`.

    Raises RefusedError where the checkpoint is not good, ConfigError where an override does not fit.
    """
    checkpoint = find_checkpoint(arguments.checkpoint)
    for word in arguments.overrides:
        if word.lstrip("+~").split("=")[0] in RESERVED_KEYS:
            raise ConfigError(f"eval: {word}: which run and which step is said before it; leave it out")
    where = format_override("dir", str(checkpoint.run_dir.path))
    words = [where, f"step={checkpoint.step}", "train.steps=0", *arguments.overrides]
    config = compose_run([*words, *([TRUST_FLAG] if arguments.trust else [])]).config
    # The jax fence: a wrong configuration is answered without it.
    from runner.session.evaluate_only import evaluate_checkpoint

    folder = choose_new_folder("eval", None) if is_in_bucket(checkpoint.run_dir) else None
    found = evaluate_checkpoint(config, checkpoint.run_dir, say, folder)
    return VerbResult({"run": str(found.run), "step": found.step, "results": found.values})
