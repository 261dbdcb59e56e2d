"""From documents to batches: shuffle, tokenise, pack, shuffle rows, batch.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids, positions (int32) and loss_weights
(float32), as `packing.py` describes them. Its rows come from virtual shards (`shard.py`): with S of
them, shard s fills rows s·B/S to (s + 1)·B/S of every batch. Host h of H has the shards from h·S/H
on, hence a contiguous block of rows, and the batch at a step is the same for every H.

Batches are prefetched in a thread, which reads several shards in parallel; the iterator's state is
that of the batch returned last, not of the prefetched ones.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging
from etils import epath

from qwen3next_jax.config import divisors
from qwen3next_jax.data.documents import (
    BadRecordError,
    Document,
    RecordTexts,
    readable,
    text_in_loss,
    tokenized,
)
from qwen3next_jax.data.hashing import hash64
from qwen3next_jax.data.holdout import split_source
from qwen3next_jax.data.packing import Piece, Row, best_fit, concatenate, fill_row
from qwen3next_jax.data.prepared import check_prepared, prepared_source
from qwen3next_jax.data.shard import Packing, Shard, TrainingPart
from qwen3next_jax.data.sources import Chained, Records, open_source
from qwen3next_jax.data.tokenizer import Tokenizer, check_vocabulary, fingerprint, load_tokenizer
from qwen3next_jax.data.train_tokenizer import train_tokenizer

_BATCHES_AHEAD = 2
_LOOKED_AT = 100  # how many of a part's first records are tried until one can be used


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run trains on and is evaluated on, and how it becomes rows.

    Attributes:
      train: the parts of the mixture, one where there is one source.
      held_out: the held-out records of all parts.
      tokenizer: of the run.
      num_shards: S.
      packing, too_long, on_error, window_rows: see `shard.Packing`.
      skipped_files: how many files could not be opened.
    """

    train: Sequence[TrainingPart]
    held_out: Records
    tokenizer: Tokenizer
    num_shards: int = 1
    packing: str = "concatenate"
    too_long: str = "error"
    on_error: str = "raise"
    window_rows: int = 128
    skipped_files: int = 0

    def row_packing(self, sequence_length: int) -> Packing:
        """How documents become rows of T = `sequence_length`."""
        return Packing(
            kind=self.packing,
            sequence_length=sequence_length,
            too_long=self.too_long,
            on_error=self.on_error,
            window_rows=self.window_rows,
        )

    def fingerprint(self) -> dict[str, Any]:
        """Identifies the data, as JSON: it must be equal when a run resumes (`check_same_data`).

        Returns:
          "records": each part's `TrainingPart.fingerprint` by name; "tokenizer": the tokenizer's
          fingerprint, which reads its file.
        """
        records = {part.name: list(part.fingerprint) for part in self.train}
        return {"records": records, "tokenizer": fingerprint(self.tokenizer)}

    def ends(self) -> list[int]:
        """Special tokens that end the loss's tokens in the first usable document of each part.

        They are EOS or, for chats, the token with which the template ends an answer.
        """
        ends = []
        known = {*self.tokenizer.special_ids, *self.tokenizer.stop_ids}
        for part in self.train:
            for i in range(min(len(part.records), _LOOKED_AT)):
                try:
                    document = tokenized(part.records[i], self.tokenizer)
                except BadRecordError:
                    continue
                in_loss = document["targets"][document["loss_weights"] > 0].tolist()
                # A template's marks may include the line end after the end-of-turn token.
                while in_loss and self.tokenizer.decode(in_loss[-1:]).isspace():
                    in_loss.pop()
                if in_loss and in_loss[-1] in known:
                    ends.append(in_loss[-1])
                elif in_loss:
                    logging.warning(
                        "What is learnt of %s ends with %r, which is no special token of %s: texts "
                        "will not know where to end; take a chat template of this tokenizer's own",
                        part.records[i].name,
                        self.tokenizer.decode(in_loss[-8:]),
                        self.tokenizer.path,
                    )
                break
        return list(dict.fromkeys(ends))

    @property
    def held_out_parts(self) -> dict[str, Records]:
        """The held-out records of each part of the mixture, by its name."""
        if not isinstance(self.held_out, Chained):
            return {"held out": self.held_out}
        names = [part.name for part in self.train]
        return dict(zip(names, self.held_out.sequences, strict=True))

    @property
    def held_out_bytes(self) -> int:
        """Size of the held-out texts in UTF-8, the denominator of bits per byte.

        Raises:
          ValueError: none of the records can be used.
        """
        return self._held_out_sizes[0]

    @property
    def gzip_bits_per_byte(self) -> float:
        """Bits per byte of the concatenated held-out texts under gzip -9, a baseline."""
        plain, compressed = self._held_out_sizes
        return 8 * compressed / plain

    @functools.cached_property
    def _held_out_sizes(self) -> tuple[int, int]:
        """Size of the held-out texts in bytes, plain and compressed, in one pass over them."""
        gzip, plain, compressed = zlib.compressobj(level=9, wbits=31), 0, 0
        for record, document in readable(self.held_out, self.tokenizer, on_error=self.on_error):
            text = text_in_loss(record, document, self.tokenizer).encode()
            plain += len(text)
            compressed += len(gzip.compress(text))
        if not plain:
            raise ValueError(
                f"None of the {len(self.held_out)} held-out records has text to predict; mend the "
                "records or raise data.holdout_fraction"
            )
        return plain, compressed + len(gzip.flush())


def load_data(
    *,
    source: str,
    path: str = "",
    field: str = "text",
    split: str = "train",
    mixture: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: str = "",
    chat_template: str = "",
    holdout_fraction: float,
    on_error: str = "raise",
    vocab_size: int,
    trained_tokenizer: str | os.PathLike,
    given_weights: str = "",
    **rows: Any,
) -> Data:
    """Opens the sources and the tokenizer; trains a tokenizer on the training part if needed.

    The arguments up to `on_error`, and `rows`, are a config's `data` section:
    `load_data(**dataclasses.asdict(config.data), vocab_size=..., trained_tokenizer=...)`.

    Args:
      source, path, field, split, on_error: see `open_source`.
      mixture: several sources instead of one, by name: for each its `weight` and whichever of
        `source`, `path`, `field` and `split` differ from the arguments of that name.
      tokenizer, chat_template: arguments of `load_tokenizer`; tokenizer "" means the tokenizer of
        prepared data, or else `trained_tokenizer`.
      holdout_fraction: share of the records held out.
      vocab_size: the model's vocabulary, an upper limit on the tokenizer's.
      trained_tokenizer: path of the run's own tokenizer, which is trained if the file is missing.
      given_weights: the checkpoint that a run begins with, or "". With one, training a tokenizer is
        refused, because the weights belong to the checkpoint's vocabulary.
      rows: `num_shards`, `packing`, `too_long`, `window_rows`, as `Data` has them.

    Raises:
      ValueError: says what is wrong with the sources or with the tokenizer.
      FileNotFoundError: there is no file `tokenizer`.
    """
    given: dict[str, Any] = {"source": source, "path": path, "field": field, "split": split}
    # A part's name decides the order of its records, and prepared data keep their source's.
    alone = prepared_source(path) if source == "prepared" else source
    parts = mixture or {alone: {"weight": 1.0}}
    train, held_out, skipped_files = [], [], 0
    for name, part in parts.items():
        opened = open_source(
            **{**given, **{k: v for k, v in part.items() if k != "weight"}}, on_error=on_error
        )
        skipped_files += len(opened.skipped_files)
        kept, out = split_source(opened, holdout_fraction)
        lengths = [[file.name, len(file)] for file in opened.files]
        part_fingerprint = (len(opened), f"{hash64(json.dumps(lengths)):016x}")
        train.append(TrainingPart(name, kept, float(part["weight"]), part_fingerprint))
        held_out.append(out)

    prepared = [
        p.get("path", path) for p in parts.values() if p.get("source", source) == "prepared"
    ]
    if prepared:
        tokenizer = tokenizer or prepared[0]
    if given_weights and not tokenizer:
        raise ValueError(
            f"The weights of train.initial_checkpoint={given_weights!r} have a vocabulary of their "
            "own, and data.tokenizer='' would train another; give theirs, as "
            f"--config.data.tokenizer={given_weights}"
        )
    if not tokenizer and not epath.Path(trained_tokenizer).exists():
        logging.info("Training a tokenizer of %d tokens: %s", vocab_size, trained_tokenizer)
        texts = RecordTexts(Chained([part.records for part in train]), on_error=on_error)
        train_tokenizer(texts, trained_tokenizer, vocab_size=vocab_size)
    loaded = load_tokenizer(tokenizer or trained_tokenizer, chat_template=chat_template)
    check_vocabulary(loaded, vocab_size)
    for directory in prepared:
        check_prepared(directory, loaded)
    return Data(
        train=train,
        held_out=Chained(held_out),
        tokenizer=loaded,
        on_error=on_error,
        skipped_files=skipped_files,
        **rows,
    )


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
        str(shard): Shard(
            data.train,
            data.tokenizer,
            data.row_packing(sequence_length),
            seed=seed,
            shard=shard,
            num_shards=data.num_shards,
        )
        for shard in range(host * own, (host + 1) * own)
    }
    batches = _ShardedBatches(shards, rows_a_shard=batch_size // data.num_shards)
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=_BATCHES_AHEAD
    )
    return iter(ahead)


def changed_records(data: Data, began_with: Mapping[str, Any]) -> dict[str, str]:
    """A line for each part of the data whose records are not those that a run began with.

    Args:
      data, began_with: arguments of `check_same_data`.
    """
    records, changed = began_with.get("records", {}), {}
    for part in data.train:
        now = list(part.fingerprint)
        then = records.get(part.name, now)
        if then != now:
            changed[part.name] = f"{part.name}: {then[0]} records then, {now[0]} now" + (
                ", in other files" if then[0] == now[0] else ""
            )
    return changed


def check_same_data(data: Data, began_with: Mapping[str, Any]) -> None:
    """Refuses to go on with other records or another tokenizer than a run began with.

    Args:
      data: the run's current data.
      began_with: `Data.fingerprint()` stored in the checkpoint; keys that an old checkpoint lacks
        are not compared.

    Raises:
      ValueError: says what changed.
    """
    tokenizer = began_with.get("tokenizer", {})
    changed = list(changed_records(data, began_with).values())
    changed += [
        f"the tokenizer's {key}: {tokenizer[key]} then, {now} now, of {data.tokenizer.path}"
        for key, now in fingerprint(data.tokenizer).items()
        if key in tokenizer and tokenizer[key] != now
    ]
    if changed:
        raise ValueError(
            "The data is not what the run began with: its order, its ids or what is held out would "
            "be others. Restore it, or begin another run in another --workdir, with these weights "
            "by --config.train.initial_checkpoint:\n  " + "\n  ".join(changed)
        )


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
        self._pool.shutdown(cancel_futures=True)
        super().close()
