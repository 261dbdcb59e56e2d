"""Packs documents of any length into rows of T tokens, in one of two ways.

- `concatenate`: documents are laid end to end and cut every T tokens. No position is wasted; a
  document that is cut continues in the next row as a new segment, without its earlier context.
- `best_fit`: documents stay whole. The longest come first, each into the fullest row that still has
  room (best-fit decreasing, never above 11/9 of the fewest rows possible plus one).

Both make a plan from the lengths alone, in which a row is a list of pieces of documents; `fill_row`
then makes the arrays. Segments count from 1 in each row and 0 is padding; positions count from 0 in
each segment.

Grain has packers too, and its best fit fills rows as well as ours (`benchmarks/input.py`). But
plans have the same small state for both ways, end where an epoch ends, and tell which documents
begin in a row, so that the records read can be counted. Also, the state of Grain's concatenation
does not survive JSON.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from qwen3next_jax.data.documents import Document

Row = dict[str, Int32[np.ndarray, " _"] | Float32[np.ndarray, " _"]]  # all [T]


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a document, given by its number."""

    document: int
    start: int
    stop: int


def concatenate(
    lengths: Sequence[int], sequence_length: int, *, offset: int = 0
) -> list[list[Piece]]:
    """Rows of T = `sequence_length` tokens without gaps; the last may be shorter.

    Args:
      lengths: of the documents, in order.
      sequence_length: T.
      offset: number of tokens of the first document to leave out.
    """
    rows: list[list[Piece]] = []
    room = 0
    for document, length in enumerate(lengths):
        start = 0 if document else offset
        while start < length:
            if room == 0:
                rows.append([])
                room = sequence_length
            stop = min(length, start + room)
            rows[-1].append(Piece(document, start, stop))
            room -= stop - start
            start = stop
    return rows


def best_fit(lengths: Sequence[int], sequence_length: int) -> list[list[Piece]]:
    """Rows of at most T = `sequence_length` tokens in which every document is whole.

    Raises:
      ValueError: a document is longer than T.
    """
    rows: list[list[Piece]] = []
    spaces: list[tuple[int, int]] = []  # (room, row), in ascending order
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        if length > sequence_length:
            raise ValueError(f"A document of {length} tokens is longer than {sequence_length=}")
        tightest = bisect.bisect_left(spaces, (length, -1))
        if tightest < len(spaces):
            room, row = spaces.pop(tightest)
        else:
            room, row = sequence_length, len(rows)
            rows.append([])
        rows[row].append(Piece(document, 0, length))
        if room > length:
            bisect.insort(spaces, (room - length, row))
    return rows


def fill_row(pieces: Sequence[Piece], documents: Sequence[Document], sequence_length: int) -> Row:
    """The arrays of a row: tokens, targets, segment_ids, positions, int32; loss_weights, float32.

    Each is [T], and 0 where there is no piece.
    """
    row: Row = {
        name: np.zeros(sequence_length, np.float32 if name == "loss_weights" else np.int32)
        for name in ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    }
    at = 0
    for segment, (number, start, stop) in enumerate(pieces, 1):
        here = slice(at, at + stop - start)
        for name in ("tokens", "targets", "loss_weights"):
            row[name][here] = documents[number][name][start:stop]
        row["segment_ids"][here] = segment
        row["positions"][here] = np.arange(stop - start)
        at = here.stop
    return row
