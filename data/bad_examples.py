"""Examples that cannot be decoded, passed over: another example of the same source takes the place of each.

Which one is a matter of the examples alone: the next one that can be decoded. So every process that makes batches
chooses the same, and so does a run that goes on. Once an example was passed over it stays so, even where its file is
mended: a run remembers them, and says so with `remember`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from data.data_errors import UndecodableError, UnreadableError
from data.sources import Source, Sources

# What a run does about an example that cannot be decoded.
OnBad = Literal["raise", "skip"]
# In a batch that comes from another process: the numbers of the examples that were newly passed over there.
NEWLY_SKIPPED = "newly skipped"


@dataclass(frozen=True)
class SkippedExample:
    """An example that is passed over: its number within its source, and what is wrong with it, in words.

    `file` is the name in `Sources.files` of the file that holds it alone; None where there is no such file.
    """

    index: int
    why: str
    file: str | None = None


class SkippingSource:
    """A source whose examples that cannot be decoded are replaced by the next ones that can.

    Args:
        source: the examples.
    """

    def __init__(self, source: Source):
        self.source = source
        self._skipped: dict[int, SkippedExample] = {}
        self._untold: list[SkippedExample] = []
        self._tell: Callable[[SkippedExample], None] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def skipped(self) -> Mapping[int, SkippedExample]:
        """Return the examples that are passed over, by their number: those of now, whenever it is looked at."""
        return self._skipped

    def remember(self, skipped: Mapping[int, SkippedExample]) -> None:
        """Pass over these from now on, whatever is in their files."""
        self._skipped.update(skipped)

    def listen(self, tell: Callable[[SkippedExample], None]) -> None:
        """Have `tell` called with each example that is passed over for the first time, and with those so far."""
        self._tell = tell
        for example in self.take_untold():
            tell(example)

    def take_untold(self) -> list[SkippedExample]:
        """Return the examples that nobody was told of yet."""
        untold, self._untold = self._untold, []
        return untold

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at `indices`, or those that take their places.

        Raises UnreadableError where no example can be decoded.
        """
        wanted = [int(index) for index in np.asarray(indices)]
        while True:
            numbers = np.array([self._find_substitute(index) for index in wanted], np.int64)
            try:
                return self.source.take(numbers)
            except UndecodableError:
                # The error names one of them; each is tried by itself, for the batch may hold several.
                for number in sorted(set(numbers.tolist())):
                    self._try_example(number)

    def _find_substitute(self, index: int) -> int:
        """Return the number of the first example from `index` on that is not passed over."""
        size = len(self.source)
        number = index % size
        while number in self._skipped:
            number = (number + 1) % size
            if number == index % size:
                raise UnreadableError(f"none of the {size:,} examples can be decoded: {self._skipped[number].why}")
        return number

    def _try_example(self, number: int) -> None:
        try:
            self.source.take(np.array([number]))
        except UndecodableError as error:
            self.note(SkippedExample(number, str(error), error.file))

    def note(self, example: SkippedExample) -> None:
        """Pass over an example from now on, and tell of it unless it was told already."""
        if example.index in self._skipped:
            return
        self._skipped[example.index] = example
        if self._tell is not None:
            self._tell(example)
        else:
            self._untold.append(example)


def attach_skipped(batch: dict[str, np.ndarray], source: Source) -> dict[str, np.ndarray]:
    """Return a batch that says which examples were newly passed over in this process."""
    untold = source.take_untold() if isinstance(source, SkippingSource) else []
    return {**batch, NEWLY_SKIPPED: np.array([json.dumps(asdict(one)) for one in untold])} if untold else batch


def detach_skipped(batch: dict[str, np.ndarray], source: Source) -> dict[str, np.ndarray]:
    """Return a batch as it is to train on, having noted in this process what another one passed over."""
    if NEWLY_SKIPPED not in batch or not isinstance(source, SkippingSource):
        return batch
    for line in batch[NEWLY_SKIPPED].tolist():
        source.note(SkippedExample(**json.loads(line)))
    return {name: column for name, column in batch.items() if name != NEWLY_SKIPPED}


def skip_bad_examples(sources: Sources, on_bad: OnBad) -> Sources:
    """Return the sources as they are, or such that pass over what cannot be decoded, as `on_bad` says."""
    if on_bad == "raise":
        return sources
    held_out = {name: SkippingSource(source) for name, source in sources.held_out.items()}
    return replace(sources, train=SkippingSource(sources.train), eval=SkippingSource(sources.eval), held_out=held_out)


def iter_skipping(sources: Sources) -> Iterator[tuple[str, SkippingSource]]:
    """Yield each source that passes over examples, with its name: `train`, `eval`, or that of a held-out set."""
    for name, source in {"train": sources.train, "eval": sources.eval, **sources.held_out}.items():
        if isinstance(source, SkippingSource):
            yield name, source
