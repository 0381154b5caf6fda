"""What may be wrong with data. Free of numpy, so that what only catches these errors imports none."""

from __future__ import annotations


class UnreadableError(ValueError):
    """Data that was there when training began cannot be read any more. The message names it."""


class UndecodableError(UnreadableError):
    """One example is there and is none: an image that is cut off, say. Others can take its place.

    Attributes:
        file: the name of the file, as in `Sources.files`, that holds nothing but this example; None where there is no
            such file.
    """

    # Set afterwards and not by __init__: so it comes through where a worker process sends the error.
    file: str | None = None


class InvalidUserData(TypeError):
    """What a user's own function returned is not what is asked of it. The message says what is wrong."""
