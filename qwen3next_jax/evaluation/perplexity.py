"""Cross-entropy and bits per byte on text.

Bits per byte are the nats of all tokens over ln 2 and over the number of bytes that they stand for.
They do not depend on the tokenizer, and compare directly with a compressor's on the same bytes.

There are two ways to lay out the same text. `perplexity` takes packed batches, as training does,
and cuts documents at the ends of rows: this is cheap, and used in training. `document_perplexity`
gives each document a row of its own, and groups documents by their length and tokens by the number
of tokens before them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from qwen3next_jax.config import ModelConfig, TrainConfig
from qwen3next_jax.data.corpus import Data
from qwen3next_jax.data.documents import readable, text_in_loss
from qwen3next_jax.data.pipeline import evaluation_batches
from qwen3next_jax.data.sources import Records
from qwen3next_jax.evaluation.evaluator import Evaluator
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.ops.platform import forward_program
from qwen3next_jax.parallel.processes import ShouldStop, unless_stopped
from qwen3next_jax.training.loss import next_token_losses

_AT_A_TIME = 1024  # documents in memory at a time


def perplexity(
    model: Qwen3Next,
    batches: Iterable[Mapping[str, Any]],
    *,
    text_bytes: int,
    chunk: int = 512,
) -> dict[str, float]:
    """Evaluates next-token prediction, without auxiliary losses.

    Args:
      model: the model, sharded as the active mesh has it.
      batches: the text, each token once, such as from `data.pipeline.evaluation_batches`.
      text_bytes: length of that text in UTF-8.
      chunk: positions of a row whose logits are materialised at a time.

    Returns:
      eval_ce in nats a token and eval_bits_per_byte; eval_dropped_assignments if assignments of
      tokens to experts were dropped.

    Raises:
      ValueError: the batches have no labels.
    """
    graph, params = nnx.split(model)
    nats = tokens = dropped = 0.0
    for batch in batches:
        losses, batch_dropped = _losses(model.dtype)(graph, params, batch, chunk)
        dropped += float(batch_dropped)
        nats += float(losses.sum())
        tokens += float(batch["loss_weights"].sum())
    if not tokens:
        raise ValueError("The held-out text holds no token that is predicted")
    result = {"eval_ce": nats / tokens, "eval_bits_per_byte": nats / math.log(2) / text_bytes}
    return result | ({"eval_dropped_assignments": dropped} if dropped else {})


@functools.partial(forward_program, static_argnums=(0, 3))
def _losses(graph, params, batch, chunk):
    return next_token_losses(nnx.merge(graph, params), batch, chunk=chunk)


def perplexity_in_training(
    train: TrainConfig, data: Data, should_stop: ShouldStop = lambda: False
) -> Callable[[Qwen3Next], dict[str, float]]:
    """The function that evaluates a training run's model on the held-out records, and logs it.

    A batch has as many rows as a micro-batch, so that it needs no more memory than a step. The
    function asks `should_stop` before each, and raises `Stopped` if so.
    """

    def evaluate(model: Qwen3Next) -> dict[str, float]:
        batches = evaluation_batches(
            data, batch_size=train.micro_batch_size, sequence_length=train.sequence_length
        )
        result = perplexity(
            model,
            unless_stopped(batches, should_stop),
            text_bytes=data.held_out_bytes,
            chunk=train.loss_chunk,
        )
        logging.info(
            "Held-out text: %.4f nats a token, %.4f bits per byte (gzip -9: %.4f)",
            result["eval_ce"],
            result["eval_bits_per_byte"],
            data.gzip_bits_per_byte,
        )
        return result

    return evaluate


def document_perplexity(
    evaluator: Evaluator,
    domains: Mapping[str, Records],
    *,
    length: int = 0,
    limit: int = 0,
    on_error: str = "raise",
) -> dict[str, Any]:
    """Evaluates documents one by one, on the tokens that training would have in its loss.

    Args:
      evaluator: the model.
      domains: records by the name of their domain.
      length: most tokens of a document to read at once; 0: the model's context. A longer document
        is cut into pieces, which are read without their predecessors; how many documents were cut
        is logged and returned.
      limit: most documents of each domain; 0: all.
      on_error: "raise", or "skip" records that cannot be used.

    Returns:
      `ce` in nats a token, `bits_per_byte`, `tokens`, `documents`, `cut_documents`; `by_length`, a
      list of {from, to, documents, tokens, ce, bits_per_byte} for documents with `from` tokens or
      more and fewer than `to`; `by_position`, a list of {from, to, tokens, ce} for tokens with
      `from` tokens or more and fewer than `to` before them in their row; if there are several
      domains, `domains`, with all of this for each.

    Raises:
      ValueError: `length` exceeds the model's context, or the documents have no labels.
    """
    check_length(evaluator.model.config, length)
    context = evaluator.model.config.context_length
    tables = {
        name: _table(evaluator, records, length=length or context, limit=limit, on_error=on_error)
        for name, records in domains.items()
    }
    together = _Table()
    for table in tables.values():
        together.add(table)
    result = together.result()
    if result["cut_documents"]:
        logging.warning(
            "%d of %d documents are longer than %d tokens and were cut",
            result["cut_documents"],
            result["documents"],
            length or context,
        )
    if len(tables) > 1:
        result["domains"] = {name: table.result() for name, table in tables.items()}
    return result


def check_length(config: ModelConfig, length: int) -> None:
    """Raises a ValueError if `length` exceeds the model's context."""
    if length > config.context_length:
        raise ValueError(
            f"{length=} exceeds the model's context of {config.context_length} tokens; give at "
            "most that, or extend it by rope_scaling (YaRN)"
        )


def _table(
    evaluator: Evaluator, records: Records, *, length: int, limit: int, on_error: str
) -> "_Table":
    table = _Table()
    documents = readable(records, evaluator.tokenizer, on_error=on_error)
    if limit:
        documents = itertools.islice(documents, limit)
    while group := list(itertools.islice(documents, _AT_A_TIME)):
        rows, weights, sizes = [], [], []
        for record, document in group:
            # A row's targets are its tokens, shifted by one.
            ids = [*document["tokens"].tolist(), int(document["targets"][-1])]
            starts = range(0, len(ids) - 1, length)
            rows += [ids[start : start + length + 1] for start in starts]
            weights += [document["loss_weights"][start : start + length] for start in starts]
            text = text_in_loss(record, document, evaluator.tokenizer)
            sizes.append((len(starts), len(ids) - 1, len(text.encode())))
        scores = iter(zip(evaluator.score(rows), weights, strict=True))
        for pieces, tokens, size in sizes:
            table.add_document(
                [(s.losses, w) for s, w in itertools.islice(scores, pieces)], tokens, size
            )
    return table


def _bits(nats: float, size: float) -> float | None:
    """Bits per byte; None if the predicted tokens have no text, as in an empty answer."""
    return nats / math.log(2) / size if size else None


class _Table:
    """Sums of nats, weights, documents and bytes, by power of two of a length or position."""

    def __init__(self):
        # By power of two. Columns: nats, weights; `lengths` also has documents and bytes.
        self.lengths = np.zeros((64, 4))
        self.positions = np.zeros((64, 2))
        self.cut = 0

    def add_document(self, pieces: list[tuple[Any, Any]], tokens: int, size: int) -> None:
        """Adds a document: its pieces' losses and weights, its number of tokens and of bytes."""
        self.cut += len(pieces) > 1
        row = self.lengths[tokens.bit_length()]
        row[2:] += 1, size
        for losses, weights in pieces:
            nats, counted = losses * weights, weights
            row[:2] += nats.sum(dtype=np.float64), counted.sum(dtype=np.float64)
            # The token predicted at index i (from 0) has i + 1 tokens before it.
            powers = np.frexp(np.arange(1, len(losses) + 1))[1]
            for column, values in enumerate((nats, counted)):
                self.positions[:, column] += np.bincount(powers, values, minlength=64)

    def add(self, other: "_Table") -> None:
        self.lengths += other.lengths
        self.positions += other.positions
        self.cut += other.cut

    def result(self) -> dict[str, Any]:
        nats, tokens, documents, size = self.lengths.sum(0)
        if not tokens:
            raise ValueError("The documents hold no token that is predicted")
        return {
            "ce": nats / tokens,
            "bits_per_byte": _bits(nats, size),
            "tokens": int(tokens),
            "documents": int(documents),
            "cut_documents": self.cut,
            "by_length": [
                {
                    "from": 2 ** (power - 1),
                    "to": 2**power,
                    "documents": int(documents),
                    "tokens": int(tokens),
                    "ce": nats / tokens,
                    "bits_per_byte": _bits(nats, size),
                }
                for power, (nats, tokens, documents, size) in enumerate(self.lengths.tolist())
                if tokens
            ],
            "by_position": [
                {"from": 2 ** (power - 1), "to": 2**power, "tokens": int(count), "ce": nats / count}
                for power, (nats, count) in enumerate(self.positions.tolist())
                if count
            ],
        }
