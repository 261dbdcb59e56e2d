"""A virtual shard: a fixed share of the records, shuffled, repeated and packed independently.

A run has a fixed number S of shards, whatever the number of hosts, and each shard fills fixed rows
of every batch, so a batch depends only on the config and the step. A shard owns every S-th record
of each source and draws a new order for them in each epoch.

It works window by window: it reads documents until they fill `window_rows` rows, packs them, and
yields the rows in a shuffled order (otherwise the rows of one long document would follow one
another). While it yields the rows of one window it reads the documents of the next, a few for each
row, so that no single row takes long.

Its state is where the window began and how many of its rows were yielded; a restored shard reads
that window again. With one source, an epoch ends with a padded row and the next epoch begins in a
new row. With several, the next document comes from the source that is furthest behind its share of
the tokens.
"""

import copy
from collections.abc import Sequence
from typing import Any

import grain

from qwen3next_jax.data.corpus import Data, TrainingPart
from qwen3next_jax.data.documents import Document, log_skipped, tokenized
from qwen3next_jax.data.hashing import hash64, permutation
from qwen3next_jax.data.packing import Piece, Row, best_fit, concatenate, fill_row
from qwen3next_jax.data.sources import BadRecordError


class _Skipped:
    """Placeholder for a record that cannot be used."""


class _Reader:
    """The documents of one part of one shard, indexed by their place in its endless sequence."""

    def __init__(
        self,
        data: Data,
        part: TrainingPart,
        *,
        sequence_length: int,
        seed: int,
        shard: int,
    ):
        own = range(shard, len(part.records), data.num_shards)
        self.size = len(own)
        if not self.size:
            raise ValueError(
                f"The source {part.name!r} has {len(part.records)} records to train on, but "
                f"data.num_shards={data.num_shards}; lower that, so that every shard has a record"
            )
        self._data, self._part, self._length = data, part, sequence_length
        self._documents = (
            grain.MapDataset.range(own.start, own.stop, own.step)
            .shuffle(seed=hash64(f"{seed}:{shard}:{part.name}") % 2**32)
            .repeat()
            .map(self._read)
        )
        self._failures = 0  # consecutive ones

    def __getitem__(self, place: int) -> tuple[Document | _Skipped, bool]:
        """The document, and whether it was truncated."""
        found, truncated = self._documents[place]
        self._failures = self._failures + 1 if isinstance(found, _Skipped) else 0
        # The only usable record may come first in one epoch and last in the next; in between, all
        # the others fail twice. More failures in a row mean that no record can be used.
        if self._failures > 2 * (self.size - 1):
            raise ValueError(f"None of a shard's records of {self._part.name!r} can be used")
        return found, truncated

    def _read(self, index: int) -> tuple[Document | _Skipped, bool]:
        data, T = self._data, self._length
        try:
            record = self._part.records[index]
            document = tokenized(record, data.tokenizer)
            length = len(document["tokens"])
            if data.packing == "concatenate" or length <= T:
                return document, False
            if data.too_long == "error":
                raise BadRecordError(
                    f"{record.name}: has {length} tokens, more than a row of {T}, and "
                    "data.packing='best_fit' keeps documents whole; raise train.sequence_length, "
                    "or set data.too_long='truncate'"
                )
            return {k: v[:T] for k, v in document.items()}, True
        except BadRecordError as error:
            if data.on_error != "skip":
                raise
            log_skipped(error)
            return _Skipped(), False


class _Window:
    """The documents that fill one window of rows.

    `start` says where the window begins: how many documents were read before it ("read") and how
    many tokens they had ("taken"), for each part, and how many tokens of its first document belong
    to the window before ("offset"). `first` is that document, if it was read already.
    """

    def __init__(
        self,
        start: dict[str, Any],
        data: Data,
        readers: Sequence[_Reader],
        sequence_length: int,
        first: Document | None = None,
    ):
        self._data, self._readers, self._length = data, readers, sequence_length
        self._first = first
        self._at = start  # after the documents read so far; replaced, never mutated
        self._before_last = self._at
        self.documents: list[Document] = []
        self.parts: list[int] = []  # of each document
        self.start = start
        self.skipped = [0] * len(readers)  # of each part
        self.truncated = 0
        self._tokens = -start["offset"]
        self._complete = False

    def read(self, share: float = 1.0) -> None:
        """Reads documents until it has this share of the window's tokens, or the epoch ends."""
        full = self._data.window_rows * self._length
        while not self._complete and self._tokens < share * full:
            self._read_one()
            if self._tokens >= full:
                self._complete = True
            elif len(self._readers) == 1 and self.documents:
                self._complete = self._at["read"][0] % self._readers[0].size == 0

    def _read_one(self) -> None:
        before, read, taken = self._at, list(self._at["read"]), list(self._at["taken"])
        part = min(range(len(taken)), key=lambda i: taken[i] / self._data.train[i].weight)
        if self._first is None:
            document, truncated = self._readers[part][read[part]]
        else:
            document, truncated, self._first = self._first, False, None
        read[part] += 1
        if isinstance(document, _Skipped):
            self.skipped[part] += 1
        else:
            self._before_last = before
            taken[part] += len(document["tokens"])
            self._tokens += len(document["tokens"])
            self.truncated += truncated
            self.documents.append(document)
            self.parts.append(part)
        self._at = {"read": read, "taken": taken, "offset": 0}

    def pack(self) -> tuple[list[list[Piece]], "_Window"]:
        """The rows, and the next window."""
        length, rows = self._length, self._data.window_rows
        lengths = [len(document["tokens"]) for document in self.documents]
        start, first = self._at, None
        if self._data.packing == "best_fit":
            plan = best_fit(lengths, length)
        else:
            plan = concatenate(lengths, length, offset=self.start["offset"])
            if len(plan) > rows:  # the last document is cut at the window's end
                start = {**self._before_last, "offset": plan[rows][0].start}
                first = self.documents[-1]
                del plan[rows:]
        return plan, _Window(start, self._data, self._readers, length, first)


class Shard:
    """An endless iterator over the rows of one virtual shard."""

    def __init__(self, data: Data, *, sequence_length: int, seed: int, shard: int):
        """Opens shard number `shard` of `data`, for rows of T = `sequence_length` tokens."""
        self._data, self._length, self._key = data, sequence_length, (seed, shard)
        self._readers = [
            _Reader(data, part, sequence_length=sequence_length, seed=seed, shard=shard)
            for part in data.train
        ]
        zeros = [0] * len(data.train)
        self._counts: dict[str, Any] = {
            "rows": 0,
            "records": list(zeros),
            "tokens": list(zeros),
            "skipped": list(zeros),
            "truncated": 0,
        }
        self._window = self._window_from({"read": zeros, "taken": zeros, "offset": 0})
        self._row = 0  # rows yielded from the window
        self._plan: list[list[Piece]] | None = None  # rows of the window, in their shuffled order
        self._upcoming = self._window

    def __next__(self) -> Row:
        if self._plan is None:
            self._plan = self._open()
        if self._row == len(self._plan):
            self._window, self._row = self._upcoming, 0
            self._plan = self._open()
        pieces = self._plan[self._row]
        self._row += 1
        self._count(pieces)
        self._upcoming.read(self._row / len(self._plan))
        return fill_row(pieces, self._window.documents, self._length)

    def get_state(self) -> dict[str, Any]:
        """The shard's position, as JSON."""
        return copy.deepcopy({**self._window.start, "row": self._row, "counts": self._counts})

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` returned."""
        start = copy.deepcopy(state)
        self._counts, self._row = start.pop("counts"), start.pop("row")
        skipped = self._counts["skipped"]
        if isinstance(skipped, int):  # an older run's, of all parts
            self._counts["skipped"] = [skipped] + [0] * (len(self._readers) - 1)
        self._window, self._plan = self._window_from(start), None

    def _window_from(self, start: dict[str, Any]) -> _Window:
        return _Window(start, self._data, self._readers, self._length)

    def _open(self) -> list[list[Piece]]:
        """Reads and packs the window."""
        self._window.read()
        plan, self._upcoming = self._window.pack()
        if self._row > len(plan):
            raise ValueError(
                f"The records hold less text than those that the run began with: row {self._row} "
                f"of {len(plan)} comes next. Restore them, or begin another run (with "
                "data.on_error='skip' it may be this version that skips more of them)"
            )
        if self._row == 0:  # otherwise they were counted before the state was taken
            for part, skipped in enumerate(self._window.skipped):
                self._counts["skipped"][part] += skipped
            self._counts["truncated"] += self._window.truncated
        start = self._window.start
        order = permutation(len(plan), *self._key, *start["read"], start["offset"])
        return [plan[row] for row in order]

    def _count(self, pieces: Sequence[Piece]) -> None:
        self._counts["rows"] += 1
        for document, start, stop in pieces:
            part = self._window.parts[document]
            self._counts["records"][part] += start == 0
            self._counts["tokens"][part] += stop - start
