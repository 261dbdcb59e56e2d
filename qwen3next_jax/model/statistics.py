"""Optional statistics of layers: means and maxima over the tokens of a batch.

A module that receives a dict, `observed`, adds its statistics to it under their names; without one
it computes none. A mean is kept as a sum and a count, so that parts (micro-batches, unrolled MTP
steps) can be combined exactly, each weighted by its tokens. Padding is left out, and no gradient
flows through statistics. On a mesh the modules see global arrays, so the statistics are global.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.attention import MASKED
from qwen3next_jax.ops.segments import document_starts

_SINK_QUERIES = 16  # per row; with all queries it would cost as much as attention itself


class Mean(NamedTuple):
    """A mean as `total / tokens`; `tokens` has the leading axes of `total`."""

    total: Array
    tokens: Float[Array, "*L"]


class Largest(NamedTuple):
    """A maximum."""

    value: Array


Observed = dict[str, Mean | Largest]


def token_mean(x: Float[Array, "B T *N"], segment_ids: Int[Array, "B T"] | None) -> Mean:
    """The mean over all tokens, separately for each entry of the trailing axes."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    real = _real(x, segment_ids)
    return Mean(jnp.einsum("bt...,bt->...", x, real), real.sum())


def largest(x: Float[Array, "B T *N"], segment_ids: Int[Array, "B T"] | None) -> Largest:
    """The largest absolute value among all entries of all tokens."""
    x = jnp.abs(jax.lax.stop_gradient(x)).astype(jnp.float32)
    each = x.max(tuple(range(2, x.ndim)))
    return Largest((each * _real(x, segment_ids)).max())


def sink_share(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
) -> Mean:
    """The share of a token's attention that goes to the first token of its document.

    The mean is over heads and over some queries, evenly spaced in each row; queries that are the
    first token themselves are left out.
    """
    q, k = jax.lax.stop_gradient((q, k))
    B, T, N, H = q.shape
    K = k.shape[2]
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    first = document_starts(segment_ids, first=True)
    step = max(T // _SINK_QUERIES, 1)

    def sampled(x):  # the last token of each stretch; no stretch spans two devices of a mesh
        x = x[:, : T // step * step]
        return x.reshape(B, T // step, step, *x.shape[2:])[:, :, -1]

    index = sampled(jnp.arange(T)[None].repeat(B, 0))
    own = sampled(segment_ids)
    seen = (own[:, :, None] == segment_ids[:, None]) & (index[:, :, None] >= jnp.arange(T))
    scores = jnp.einsum(
        "bqkrh,bskh->bkrqs",
        sampled(q).reshape(B, -1, K, N // K, H),
        k,
        preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], H**-0.5 * scores, MASKED), axis=-1)
    share = (weights * first[:, None, None, None]).sum(-1).mean((1, 2))
    counted = ((own != 0) & ~sampled(first)).astype(jnp.float32)
    return Mean((share * counted).sum(), counted.sum())


def combine_parts(observed: Observed) -> Observed:
    """Combines parts that are stacked along the first axis; means are weighted by their tokens."""
    return {
        name: Mean(x.total.sum(0), x.tokens.sum(0))
        if isinstance(x, Mean)
        else Largest(x.value.max(0))
        for name, x in observed.items()
    }


def concatenate_layers(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Concatenates statistics of layers, tuples of arrays by name, along the first axis.

    A statistic that only some of the layers have is concatenated over those, in order.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: jax.tree.map(
            lambda *x: jnp.concatenate(x), *(part[name] for part in parts if name in part)
        )
        for name in names
    }


def _real(x, segment_ids):
    if segment_ids is None:
        return jnp.ones(x.shape[:2])
    return (segment_ids != 0).astype(jnp.float32)
