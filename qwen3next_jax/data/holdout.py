"""Chooses the records held out for evaluation, by a record's name alone.

A held-out record must stay held out when a run is resumed, when other records or files are added or
removed, and when the corpus moves to another folder. So the record's name is hashed to a number in
[0, 1), and the record is held out if that is below the fraction. Raising the fraction only adds
records. In a file of many records, each record's number is mixed into the hash of the file's name,
which takes a second for millions of them.
"""

import numpy as np

from qwen3next_jax.data.hashing import hash64, mix64
from qwen3next_jax.data.sources import Record, Source


class Part:
    """The held-out records of a source, or with `training` all the others.

    Held-out records are few, so only their numbers are kept, for both parts.
    """

    def __init__(self, source: Source, held_out: np.ndarray, *, training: bool):
        self.source = source
        self._held_out, self._training = held_out, training
        # For each held-out record, the number of training records before it.
        self._before = held_out - np.arange(len(held_out))

    def __len__(self) -> int:
        held_out = len(self._held_out)
        return len(self.source) - held_out if self._training else held_out

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if not self._training:
            return self.source[int(self._held_out[index])]
        return self.source[index + int(np.searchsorted(self._before, index, side="right"))]


def split_source(source: Source, holdout_fraction: float) -> tuple[Part, Part]:
    """The training part and the held-out part; raises a ValueError if either is empty."""
    parts, start = [np.zeros(0, np.int64)], 0
    for file in source.files:
        hashes = np.array([hash64(file.name)], np.uint64)
        if not file.is_one_document:
            hashes = mix64(hashes ^ mix64(np.arange(1, len(file) + 1, dtype=np.uint64)))
        parts.append(start + np.flatnonzero(hashes / 2.0**64 < holdout_fraction))
        start += len(file)
    held_out = np.concatenate(parts)
    if start == 1:
        source[0]  # which may say that it is none, such as a file of another kind
        raise ValueError(
            "The data is a single record, which cannot be divided into a training and a held-out "
            "part. With data.source='text' a file is a record: split it, or store it as JSONL with "
            "a document a line"
        )
    for empty, name, remedy in (
        (len(held_out) == start, "training", "lower"),
        (len(held_out) == 0, "held-out", "raise"),
    ):
        if empty:
            raise ValueError(
                f"data.holdout_fraction={holdout_fraction} leaves none of the {start} records "
                f"for the {name} part; {remedy} it or add records"
            )
    return Part(source, held_out, training=True), Part(source, held_out, training=False)
