"""What to trace, as options. No jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Trace some steps with `jax.profiler`, into RUN/profile. `touch RUN/PROFILE` traces the next ones.

    Attributes:
        start: the first step that is traced; null: none, until somebody makes the file RUN/PROFILE.
        steps: trace so many.
    """

    start: Count | None = None
    steps: Count = 5
