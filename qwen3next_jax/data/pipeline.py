"""From documents to batches: shuffle, tokenise, pack, shuffle rows, batch.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids, positions (int32) and loss_weights
(float32), as `packing.py` describes them. Its rows come from virtual shards (`shard.py`): with S of
them, shard s fills rows s·B/S to (s + 1)·B/S of every batch. Host h of H has the shards from h·S/H
on, hence a contiguous block of rows, and the batch at a step is the same for every H.

Batches are prefetched in a thread, which reads several shards in parallel; the iterator's state is
that of the batch returned last, not of the prefetched ones.
"""

import concurrent.futures
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from qwen3next_jax.config import divisors
from qwen3next_jax.data.corpus import Data
from qwen3next_jax.data.documents import Document, readable
from qwen3next_jax.data.packing import Piece, Row, best_fit, concatenate, fill_row
from qwen3next_jax.data.shard import Shard

_BATCHES_AHEAD = 2


def training_batches(
    data: Data,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    hosts: int = 1,
    host: int = 0,
) -> grain.DatasetIterator:
    """An endless iterator over this host's rows of each batch; an epoch has every record once.

    `get_state()` returns a JSON dict that maps the number of each of this host's shards to its
    state; the run's state is the union over all hosts. `set_state(state)` of a new iterator over
    the same data continues after the batch returned last, with any number of hosts.

    Args:
      data: the training data and S, the number of its virtual shards.
      batch_size: B, rows of a batch over all hosts.
      sequence_length: T.
      seed: seed for the order of records and rows.
      hosts: H, the number of hosts.
      host: h, this host's number from 0; it yields rows h·B/H to (h + 1)·B/H.

    Raises:
      ValueError: S does not divide B, H does not divide S, or a source has fewer records than S.
    """
    check_shards(data.num_shards, batch_size=batch_size, hosts=hosts)
    if not 0 <= host < hosts:
        raise ValueError(f"host={host} must lie between 0 and {hosts - 1}")
    own = data.num_shards // hosts
    shards = {
        str(shard): Shard(data, sequence_length=sequence_length, seed=seed, shard=shard)
        for shard in range(host * own, (host + 1) * own)
    }
    batches = _ShardedBatches(shards, rows_a_shard=batch_size // data.num_shards)
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=_BATCHES_AHEAD
    )
    return iter(ahead)


def check_shards(num_shards: int, *, batch_size: int, hosts: int) -> None:
    """Refuses shards that do not divide a batch's rows, and hosts that do not divide the shards."""
    for name, value, divisor_name, divisor in (
        ("train.global_batch_size", batch_size, "data.num_shards", num_shards),
        ("data.num_shards", num_shards, "the number of hosts", hosts),
    ):
        if value % divisor:
            raise ValueError(
                f"{name}={value} is not divisible by {divisor_name}, {divisor}; choose one of "
                + ", ".join(map(str, divisors(value)))
            )


def input_metrics(
    data: Data, states: Mapping[str, Any], *, sequence_length: int
) -> dict[str, float]:
    """Counts of the records and tokens that shards have yielded so far, from their states.

    For each part NAME: NAME/epoch (how often its records were read, skipped ones too), NAME/records
    and NAME/tokens. Over all parts: packing_efficiency, the share of positions that hold a token;
    skipped_records, truncated_records and skipped_files.
    """
    counts = [state["counts"] for state in states.values()]
    metrics: dict[str, float] = {}
    for i, part in enumerate(data.train):
        size = sum(len(range(int(s), len(part.records), data.num_shards)) for s in states)
        records = sum(count["records"][i] for count in counts)
        skipped = sum(count["skipped"][i] for count in counts)
        metrics[f"{part.name}/epoch"] = (records + skipped) / size
        metrics[f"{part.name}/records"] = records
        metrics[f"{part.name}/tokens"] = sum(count["tokens"][i] for count in counts)
    positions = sum(count["rows"] for count in counts) * sequence_length
    tokens = sum(sum(count["tokens"]) for count in counts)
    metrics["packing_efficiency"] = tokens / max(positions, 1)
    metrics["skipped_records"] = sum(sum(count["skipped"]) for count in counts)
    metrics["truncated_records"] = sum(count["truncated"] for count in counts)
    metrics["skipped_files"] = data.skipped_files
    return metrics


def evaluation_batches(
    data: Data, *, batch_size: int, sequence_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches in which every token of the held-out records, EOS included, is a target exactly once.

    The last row is padded, and the last batch is filled with rows of padding. A document longer
    than a row is cut, never left out, even with `data.packing="best_fit"`.
    """
    rows = _evaluation_rows(data, sequence_length)
    while batch := list(itertools.islice(rows, batch_size)):
        batch += [fill_row([], [], sequence_length)] * (batch_size - len(batch))
        yield _stack(batch)


def _evaluation_rows(data: Data, sequence_length: int) -> Iterator[Row]:
    """Packs window by window; a window's last row is continued in the next window."""
    pack = concatenate if data.packing == "concatenate" else best_fit
    window: list[Document] = []

    def pack_window() -> list[list[Piece]]:
        return pack([len(document["tokens"]) for document in window], sequence_length)

    tokens = 0
    for _, document in readable(data.held_out, data.tokenizer, on_error=data.on_error):
        if pack is concatenate:  # which cuts documents itself, at the ends of rows
            window.append(document)
        else:
            starts = range(0, len(document["tokens"]), sequence_length)
            window += [_part(document, start, start + sequence_length) for start in starts]
        tokens += len(document["tokens"])
        if tokens >= data.window_rows * sequence_length:
            *plan, last = pack_window()
            yield from (fill_row(pieces, window, sequence_length) for pieces in plan)
            window = [_part(window[number], start, stop) for number, start, stop in last]
            tokens = sum(len(document["tokens"]) for document in window)
    yield from (fill_row(pieces, window, sequence_length) for pieces in pack_window())


def _part(document: Document, start: int, stop: int) -> Document:
    return {name: array[start:stop] for name, array in document.items()}


def _stack(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class _ShardedBatches(grain.IterDataset):
    """An endless sequence of batches from the rows of some shards."""

    def __init__(self, shards: Mapping[str, Shard], *, rows_a_shard: int):
        super().__init__()
        self._shards, self._rows = shards, rows_a_shard

    def __iter__(self) -> grain.DatasetIterator:
        return _ShardedBatchesIterator(self._shards, self._rows)


class _ShardedBatchesIterator(grain.DatasetIterator):
    def __init__(self, shards: Mapping[str, Shard], rows_a_shard: int):
        super().__init__()
        self._shards, self._rows = shards, rows_a_shard
        threads = min(len(shards), os.cpu_count() or 1)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "read-shards")

    def __next__(self) -> dict[str, np.ndarray]:
        def take(shard: Shard) -> list[Row]:
            return [next(shard) for _ in range(self._rows)]

        taken = self._pool.map(take, self._shards.values())
        return _stack([row for rows in taken for row in rows])

    def get_state(self) -> dict[str, Any]:
        return {name: shard.get_state() for name, shard in self._shards.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        missing = self._shards.keys() - state.keys()
        if missing:
            raise ValueError(
                f"The state is of shards {', '.join(state)} and lacks {', '.join(sorted(missing))};"
                " it takes the states of all hosts"
            )
        for name, shard in self._shards.items():
            shard.set_state(state[name])

    def close(self) -> None:
        # Grain calls it again when the iterator is deleted, at exit with half of the modules gone.
        if not self._closed:
            self._pool.shutdown(cancel_futures=True)
        super().close()
