"""From documents to batches: shuffle, tokenise, pack, shuffle rows, batch.

A batch is a dict of [B, T] arrays: tokens, targets, segment_ids, positions (int32) and loss_weights
(float32), as `packing.py` describes them. Threads tokenise a few documents ahead; the iterator's
state counts the documents that were used, not those read ahead, so a restored iterator goes on with
bit-identical batches.
"""

import dataclasses
import functools
import gzip
import os
from collections.abc import Sequence

import grain
import numpy as np
from absl import logging
from etils import epath

from qwen3next_jax.data.corpus import Document, read_corpus
from qwen3next_jax.data.packing import next_token_pairs, pack
from qwen3next_jax.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_tokenizer,
)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains on and is evaluated on."""

    train: list[Document]
    held_out: list[Document]
    tokenizer: Tokenizer

    @functools.cached_property
    def held_out_bytes(self) -> int:
        """Length of the held-out texts in UTF-8, the denominator of bits per byte."""
        return sum(len(document.text.encode()) for document in self.held_out)

    def gzip_bits_per_byte(self) -> float:
        """What gzip -9 needs for the held-out texts, one after another: a yardstick."""
        text = b"".join(document.text.encode() for document in self.held_out)
        return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


def load_data(
    *,
    source: str,
    path: str,
    tokenizer: str,
    holdout_fraction: float,
    vocab_size: int,
    trained_tokenizer: str | os.PathLike,
) -> Data:
    """Reads the documents and the tokenizer; at the first run, trains that on the training part.

    The first four arguments are a config's `data` section:
    `load_data(**dataclasses.asdict(config.data), vocab_size=..., trained_tokenizer=...)`.

    Args:
      source: "stdlib" or "text"; see `read_corpus`.
      path: the glob of "text".
      tokenizer: what `load_tokenizer` takes; "" stands for `trained_tokenizer`.
      holdout_fraction: share of the documents held out.
      vocab_size: of the model, hence the most that the tokenizer may have.
      trained_tokenizer: where the tokenizer is kept; it is trained if there is no such file.

    Raises:
      ValueError: says what is wrong with the documents or with the tokenizer.
      FileNotFoundError: there is no file `tokenizer`.
    """
    corpus = read_corpus(source=source, path=path, holdout_fraction=holdout_fraction)
    if tokenizer or epath.Path(trained_tokenizer).exists():
        loaded: Tokenizer = load_tokenizer(tokenizer or trained_tokenizer)
    else:
        logging.info("Training a tokenizer of %d tokens: %s", vocab_size, trained_tokenizer)
        texts = [document.text for document in corpus.train]
        loaded = train_tokenizer(texts, trained_tokenizer, vocab_size=vocab_size)
    check_vocabulary(loaded, vocab_size)
    return Data(corpus.train, corpus.held_out, loaded)


def training_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    shuffled_rows: int = 1024,
) -> grain.DatasetIterator:
    """Batches without end, in which each epoch has every document once.

    Documents are shuffled anew in each epoch. As a long one fills many rows in a row, and would
    fill whole batches, rows are then shuffled too, `shuffled_rows` at a time.

    `get_state()` returns a dict that JSON can hold; `set_state(state)` on a new iterator over the
    same arguments goes on after the batch that was last returned.
    """
    order = grain.MapDataset.source(documents).shuffle(seed=seed).repeat()
    rows = grain.experimental.WindowShuffleIterDataset(
        _rows(order, tokenizer, sequence_length), window_size=shuffled_rows, seed=seed
    )
    return iter(rows.batch(batch_size))


def evaluation_batches(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
) -> grain.DatasetIterator:
    """Batches in which every token of `documents`, EOS included, is a target exactly once.

    The last row, and the last batch by whole rows, are filled up with padding.
    """
    rows = _rows(grain.MapDataset.source(documents), tokenizer, sequence_length)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return iter(rows.batch(batch_size, batch_fn=pad))


def _rows(
    documents: grain.MapDataset, tokenizer: Tokenizer, sequence_length: int
) -> grain.IterDataset:
    def tokenize(document: Document) -> dict[str, np.ndarray]:
        ids = tokenizer.encode(document.text)
        return next_token_pairs(ids, bos=tokenizer.bos_id, eos=tokenizer.eos_id)

    read_ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
    return pack(documents.map(tokenize).to_iter_dataset(read_ahead), sequence_length)
