"""One flag that says: stop at the next step boundary, and why. Sources raise it; ordinary code looks at it."""

from __future__ import annotations


class Watcher:
    """The flag. `notice` is None until the first source raises it; the first reason stays."""

    def __init__(self) -> None:
        self.notice: str | None = None

    def raise_flag(self, reason: str) -> None:
        self.notice = self.notice or reason
