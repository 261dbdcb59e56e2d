"""Cross-entropy and bits per byte on held-out text.

Bits per byte do not depend on the tokenizer: the nats of all tokens, over ln 2 and the number of
bytes that they stand for. A compressor's figure for the same bytes is directly comparable.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from qwen3next_jax.training.loss import next_token_losses


def perplexity(
    graph: nnx.GraphDef,
    params: nnx.State,
    batches: Iterable[Mapping[str, Any]],
    *,
    text_bytes: int,
    chunk: int = 512,
) -> dict[str, float]:
    """Evaluates next-token prediction; no auxiliary loss is part of it.

    Args:
      graph, params: a model, split.
      batches: all of the text, each token once; see `data.pipeline.evaluation_batches`.
      text_bytes: length of that text in UTF-8.
      chunk: positions of a row whose logits exist at a time.

    Returns:
      eval_ce in nats a token and eval_bits_per_byte.
    """
    nats = tokens = 0.0
    for batch in batches:
        losses = _losses(graph, params, batch, chunk)
        nats += float(losses.sum())
        tokens += float(batch["loss_weights"].sum())
    return {"eval_ce": nats / tokens, "eval_bits_per_byte": nats / math.log(2) / text_bytes}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _losses(graph, params, batch, chunk):
    return next_token_losses(nnx.merge(graph, params), batch, chunk=chunk)
