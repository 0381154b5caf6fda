"""`eval`: what the evaluations of a run measure on one of its checkpoints; or others, named here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from runner.config.schema import Config
from runner.config.user_code import FLAG
from runner.errors import ConfigError
from runner.inspect.lookup import checkpoint_at
from runner.values import Answer, Say

OURS = ("dir", "step", "train.steps", "resume", "overwrite")


def arguments(parser: ArgumentParser) -> None:
    """A checkpoint, and what is to be different from the run's own configuration."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named; often RUN@best")
    parser.add_argument(FLAG, action="store_true", help="import the code that the run names as its own")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as eval=[metrics,text] train.eval_batches=100"
    )


def run(arguments: Namespace, say: Say) -> Answer:
    """Evaluate. Raises RefusedError where the checkpoint is not good, ConfigError for what does not fit."""
    checkpoint = checkpoint_at(arguments.checkpoint)
    for word in arguments.overrides:
        if word.lstrip("+~").split("=")[0] in OURS:
            raise ConfigError(f"eval: {word}: which run and which step is said before it; leave it out")
    from runner.launch.command_line import Command
    from runner.launch.compose import compose

    document: dict[str, object] = {}

    def start(config: Config, command: Command) -> tuple[int, float | None]:
        from runner.session.evaluate_only import again

        found = again(config, checkpoint.run, say)
        document.update({"run": str(found.run), "step": found.step, "results": found.values})
        return 0, None

    words = [f"dir={checkpoint.run.path}", f"step={checkpoint.step}", "train.steps=0", *arguments.overrides]
    words += [FLAG] if arguments.trust else []
    return Answer(document, compose(words, start))
