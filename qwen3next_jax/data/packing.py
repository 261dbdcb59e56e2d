"""Documents of any length as rows of T tokens: concatenate, then split.

A document's ids, between BOS and EOS, become two parallel sequences, what is read (all but the
last) and what is to be predicted (all but the first). These are laid end to end and cut every T
tokens, so each token after a BOS is predicted exactly once, also where a document is cut between
rows, and only the last row of a finite dataset is padded. A cut document goes on in the next row
as a new segment, without its context.
"""

from typing import Any

import grain
import numpy as np
from jaxtyping import Float32, Int32


def next_token_pairs(ids: list[int], *, bos: int, eos: int) -> dict[str, Int32[np.ndarray, " n"]]:
    """What is read and what is predicted in one document, n = len(ids) + 1."""
    delimited = np.array([bos, *ids, eos], np.int32)
    return {"tokens": delimited[:-1], "targets": delimited[1:]}


def pack(documents: grain.IterDataset, sequence_length: int) -> grain.IterDataset:
    """Packs elements as `next_token_pairs` returns them into rows of T = `sequence_length`.

    A row holds tokens, targets, segment_ids and positions, int32 [T], and loss_weights, float32
    [T]: 1 where there is a target and 0 at padding. Segments count from 1 in each row and 0 is
    padding; positions count from 0 in each segment.
    """
    rows = grain.experimental.ConcatThenSplitIterDataset(
        documents, length_struct={"tokens": sequence_length, "targets": sequence_length}
    )
    return _RestorableFromJson(rows).map(_name_fields)


def _name_fields(
    row: dict[str, np.ndarray],
) -> dict[str, Int32[np.ndarray, " T"] | Float32[np.ndarray, " T"]]:
    segment_ids = row["targets_segment_ids"]
    return {
        "tokens": row["tokens"],
        "targets": row["targets"],
        "loss_weights": (segment_ids > 0).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": row["targets_positions"],
    }


class _RestorableFromJson(grain.IterDataset):
    """Gives the packing's state back the tuples that JSON turned into lists.

    Grain 0.2.18 compares the slices in that state with a tuple; a list is never equal to it, and
    the restored iterator would skip a document.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _RestorableFromJsonIterator(iter(self._parent))


class _RestorableFromJsonIterator(grain.DatasetIterator):
    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {name: tuple(pair) for name, pair in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})
