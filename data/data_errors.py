"""What may be wrong with data. Free of numpy, so that what only catches these errors imports none."""

from __future__ import annotations


class UnreadableError(ValueError):
    """Data that was there when training began cannot be read any more. The message names it."""


class InvalidUserData(TypeError):
    """What a user's own function returned is not what is asked of it. The message says what is wrong."""
