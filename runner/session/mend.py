"""Mend what is derived in a finished run: the link to the best checkpoint, its page, the mirrors of its log.

The disk may have been full, or a server away, when the run ended. Its checkpoints and metrics.jsonl are the truth; all
else is made from them again when the command is typed once more.
"""

from __future__ import annotations

from contextlib import suppress

from runner.checkpoint.checkpointer import link_best
from runner.checkpoint.record import list_records
from runner.config.identity import hash_config
from runner.config.schema import Config
from runner.log.fanout import fill_in_sinks
from runner.log.sinks import CutPoint, SinkContext
from runner.rundir.layout import RunDir
from runner.rundir.readme import write_readme
from runner.session.standing import Standing
from runner.values import Say


def mend_finished(config: Config, run_dir: RunDir, standing: Standing, say: Say) -> None:
    """Bring what is derived to what the checkpoints and metrics.jsonl of a finished run say; quick where nothing lacks.

    Its lock must be held. A disk that is still in trouble changes nothing: it is mended the next time.
    """
    with suppress(OSError):
        link_best(run_dir.checkpoints, list_records(run_dir.checkpoints), config.score)
        if not run_dir.readme.exists():
            write_readme(run_dir)
    context = SinkContext(
        metrics=run_dir.metrics,
        cut_point=CutPoint(standing.status["step"]),
        attempt=standing.status.get("attempt", {}).get("attempt", 0),
        document=config.document,
        lineage=f"{hash_config(config.document)} {standing.status.get('skipped', [])}",
        say=say,
    )
    fill_in_sinks(config.log, context)
