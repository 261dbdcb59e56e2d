"""Attention from query blocks to key blocks as TPU kernels, for rows that are split over devices.

`accumulate` and `accumulate_gradients` are the functions of these names in `ops/attention.py`, with
the same arguments and results; here the scores of a pair of blocks stay in the chip's vector
memory. The grid walks the pairs sorted by query block, or by key block for the gradients of keys
and values. What is accumulated for a block is read at its first pair, stays in vector memory, and
is written at its last one. Blocks of no pair keep what they have, since the arrays that a kernel
returns are those it was given to continue.

A pair is skipped if its blocks cannot have a document in common. Numbers of queries, such as the
softmax's denominators, are passed as rows [1, C] along the lanes, which is dense in memory, and
turned to columns once a block. Softmax is float32; products have factors of the inputs' dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.attention import MASKED, Carry, Pairs, meet
from qwen3next_jax.ops.pallas import tpu

BLOCK = 512  # number of queries, and of keys, of a block


def accumulate(
    carry: Carry,
    q: Float[Array, "Z B K R C H"],
    k: Float[Array, "Z B K C H"],
    v: Float[Array, "Z B K C P"],
    q_segments: Int[Array, "Z B C"],
    k_segments: Int[Array, "Z B C"],
    pairs: Pairs,
    *,
    causal: bool,
) -> Carry:
    """Updates the running softmax with the given pairs, as `ops.attention.accumulate` does."""
    total, *softmax = carry
    walk = _Walk(q, v, q_segments, k_segments, pairs, by_key=False)
    total, softmax = walk.run(
        functools.partial(_softmax_kernel, causal),
        dict(q=q, k=k, v=v),
        dict(out=total, numbers=jnp.stack(softmax, axis=-2)),
        scratch=[walk.shape("out"), (walk.C, 1), (walk.C, 1)],
        products=(1, 1),
    )
    return total, softmax[..., 0, :], softmax[..., 1, :]


def accumulate_gradients(
    d_q: Float[Array, "Z B K R C H"],
    q: Float[Array, "Z B K R C H"],
    k: Float[Array, "Z B K C H"],
    v: Float[Array, "Z B K C P"],
    q_segments: Int[Array, "Z B C"],
    k_segments: Int[Array, "Z B C"],
    lse: Float[Array, "Z B K R C"],
    delta: Float[Array, "Z B K R C"],
    d_out: Float[Array, "Z B K R C P"],
    pairs: Pairs,
    *,
    causal: bool,
) -> tuple[Float[Array, "Z B K R C H"], Float[Array, "Z B K C H"], Float[Array, "Z B K C P"]]:
    """Backpropagates through the given pairs, as `ops.attention.accumulate_gradients` does."""
    given = dict(q=q, k=k, v=v, out=d_out, numbers=jnp.stack([lse, delta], axis=-2))
    by_query, by_key = (
        _Walk(q, v, q_segments, k_segments, pairs, by_key=by_key) for by_key in (False, True)
    )
    (d_q,) = by_query.run(
        functools.partial(_query_kernel, causal),
        given,
        dict(q=d_q),
        scratch=[by_query.shape("q"), (by_query.C, 1), (by_query.C, 1)],
        products=(2, 1),
    )
    d_k, d_v = by_key.run(
        functools.partial(_key_kernel, causal),
        given,
        {name: jnp.zeros(given[name].shape, jnp.float32) for name in ("k", "v")},
        scratch=[by_key.shape("k"), by_key.shape("v")],
        products=(2, 2),
    )
    return d_q, d_k, d_v


class _Walk:
    """A kernel's walk through pairs of blocks, sorted by query block or by key block."""

    def __init__(self, q, v, q_segments, k_segments, pairs, *, by_key):
        _, B, K, R, self.C, self.H = q.shape
        self.P, self.by_key = v.shape[-1], by_key
        i, j = (jnp.asarray(x) for x in pairs)
        order = jnp.argsort(j if by_key else i, stable=True)
        i, j = i[order], j[order]
        meeting = meet(q_segments, k_segments, (i, j))
        # By row of the batch and pair, in one axis: a short last axis would fill scalar memory.
        self.scalars = i, j, meeting.T.reshape(-1).astype(jnp.int32)
        # Of the pair's two blocks' ids one is a column, the other a row.
        segments = {"q ids": q_segments, "k ids": k_segments}
        self.segments = {
            name: ids[:, :, None] if (name == "q ids") == by_key else ids[..., None]
            for name, ids in segments.items()
        }
        self.grid = (B, K, len(i), R) if by_key else (B, K, R, len(i))

    def shape(self, name):
        """The last two axes of a block."""
        C = self.C
        return {
            "q": (C, self.H),
            "k": (C, self.H),
            "v": (C, self.P),
            "out": (C, self.P),
            "numbers": (2, C),
        }.get(name) or self.segments[name].shape[2:]

    def spec(self, name):
        """The block that a step of the grid uses of an array."""
        of_keys, heads = name in ("k", "v", "k ids"), 2
        if "ids" in name:
            heads = 0
        elif of_keys:
            heads = 1

        def index(b, head, x, y, i, j, meet):
            r, pair = (y, x) if self.by_key else (x, y)
            return (j if of_keys else i)[pair], b, *(head, r)[:heads], 0, 0

        return pl.BlockSpec((None,) * (2 + heads) + self.shape(name), index)

    def run(self, kernel, given, carried, *, scratch, products):
        """Calls a kernel with the arrays `given` and those that it continues, `carried`, by name.

        `products` are the numbers of a pair's products of the size of H (such as Q Kᵀ) and of P.
        """
        given = given | self.segments
        arrays = [*given.values(), *carried.values()]
        pairs, size = math.prod(self.grid), self.C**2
        with_h, with_p = products
        passes = 1 if given["v"].dtype == jnp.bfloat16 else 6
        return tpu.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=self.grid,
                in_specs=[self.spec(name) for name in (*given, *carried)],
                out_specs=[self.spec(name) for name in carried],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in carried.values()],
            input_output_aliases={
                len(self.scalars) + len(given) + n: n for n in range(len(carried))
            },
            # As if no pair was skipped. Blocks of the other side are fetched for each pair.
            cost_estimate=pl.CostEstimate(
                flops=passes * 2 * pairs * size * (with_h * self.H + with_p * self.P),
                transcendentals=pairs * size,
                bytes_accessed=pairs * self.C * (self.H + self.P) * given["v"].dtype.itemsize
                + sum(x.size * x.dtype.itemsize for x in (*arrays, *carried.values())),
            ),
            # Gradients of keys and values are summed over the query heads too.
            semantics=(
                "parallel",
                "parallel",
                "arbitrary" if self.by_key else "parallel",
                "arbitrary",
            ),
            name=kernel.func.__name__.strip("_"),
        )(*self.scalars, *arrays)


def _softmax_kernel(
    causal,
    i_ref,
    j_ref,
    meet_ref,
    q_ref,
    k_ref,
    v_ref,
    q_ids_ref,
    k_ids_ref,
    total_in_ref,
    softmax_in_ref,
    total_out_ref,
    softmax_out_ref,
    total_ref,
    highest_ref,
    denominator_ref,
):
    pair = pl.program_id(3)
    first, last = _ends(i_ref, pair)

    @pl.when(first)
    def _():
        total_ref[...] = total_in_ref[...]
        highest_ref[...] = tpu.column(softmax_in_ref[0:1])
        denominator_ref[...] = tpu.column(softmax_in_ref[1:2])

    @pl.when(_meet(meet_ref, i_ref, pair))
    def _():
        v, highest = v_ref[...], highest_ref[...]
        mask = _mask(q_ids_ref, k_ids_ref, i_ref[pair], j_ref[pair], causal)
        scores = jnp.where(mask, _scores(q_ref[...], k_ref[...]), MASKED)
        new_highest = jnp.maximum(highest, scores.max(1, keepdims=True))
        weights, rescale = jnp.exp(scores - new_highest), jnp.exp(highest - new_highest)
        total_ref[...] = rescale * total_ref[...] + tpu.dot(weights.astype(v.dtype), v)
        denominator_ref[...] = rescale * denominator_ref[...] + weights.sum(1, keepdims=True)
        highest_ref[...] = new_highest

    @pl.when(last)
    def _():
        total_out_ref[...] = total_ref[...]
        softmax_out_ref[0:1] = tpu.row(highest_ref[...])
        softmax_out_ref[1:2] = tpu.row(denominator_ref[...])


def _query_kernel(
    causal,
    i_ref,
    j_ref,
    meet_ref,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    numbers_ref,
    q_ids_ref,
    k_ids_ref,
    d_q_in_ref,
    d_q_out_ref,
    d_q_ref,
    lse_ref,
    delta_ref,
):
    pair = pl.program_id(3)
    first, last = _ends(i_ref, pair)

    @pl.when(first)
    def _():
        d_q_ref[...] = d_q_in_ref[...]
        lse_ref[...] = tpu.column(numbers_ref[0:1])
        delta_ref[...] = tpu.column(numbers_ref[1:2])

    @pl.when(_meet(meet_ref, i_ref, pair))
    def _():
        k = k_ref[...]
        mask = _mask(q_ids_ref, k_ids_ref, i_ref[pair], j_ref[pair], causal)
        scores = jnp.where(mask, _scores(q_ref[...], k), MASKED)
        weights = jnp.exp(scores - lse_ref[...])
        d_weights = tpu.dot(d_out_ref[...], v_ref[...], contract=(1, 1))
        d_scores = k.shape[1] ** -0.5 * (weights * (d_weights - delta_ref[...]))
        d_q_ref[...] += tpu.dot(d_scores.astype(k.dtype), k)

    @pl.when(last)
    def _():
        d_q_out_ref[...] = d_q_ref[...]


def _key_kernel(
    causal,
    i_ref,
    j_ref,
    meet_ref,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    numbers_ref,
    q_ids_ref,
    k_ids_ref,
    d_k_in_ref,
    d_v_in_ref,
    d_k_out_ref,
    d_v_out_ref,
    d_k_ref,
    d_v_ref,
):
    pair, r = pl.program_id(2), pl.program_id(3)
    first, last = _ends(j_ref, pair)

    @pl.when(first & (r == 0))
    def _():
        d_k_ref[...] = d_k_in_ref[...]
        d_v_ref[...] = d_v_in_ref[...]

    @pl.when(_meet(meet_ref, i_ref, pair))
    def _():  # scores are [keys, queries] here
        q, d_out = q_ref[...], d_out_ref[...]
        mask = _mask(q_ids_ref, k_ids_ref, i_ref[pair], j_ref[pair], causal, by_key=True)
        scores = jnp.where(mask, _scores(k_ref[...], q), MASKED)
        weights = jnp.exp(scores - numbers_ref[0:1])
        d_v_ref[...] += tpu.dot(weights.astype(d_out.dtype), d_out)
        d_weights = tpu.dot(v_ref[...], d_out, contract=(1, 1))
        d_scores = q.shape[1] ** -0.5 * (weights * (d_weights - numbers_ref[1:2]))
        d_k_ref[...] += tpu.dot(d_scores.astype(q.dtype), q)

    @pl.when(last & (r == pl.num_programs(3) - 1))
    def _():
        d_k_out_ref[...] = d_k_ref[...]
        d_v_out_ref[...] = d_v_ref[...]


def _ends(blocks_ref, pair):
    """Whether a pair is the first, and whether it is the last, of its block."""
    block, final = blocks_ref[pair], blocks_ref.shape[0] - 1
    first = (pair == 0) | (blocks_ref[jnp.maximum(pair - 1, 0)] != block)
    last = (pair == final) | (blocks_ref[jnp.minimum(pair + 1, final)] != block)
    return first, last


def _meet(meet_ref, i_ref, pair):
    """Whether the two blocks may have a document in common, in this row of the batch."""
    return meet_ref[pl.program_id(0) * i_ref.shape[0] + pair] != 0


def _mask(q_ids_ref, k_ids_ref, i, j, causal, *, by_key=False):
    """True where a query of block i may attend to a key of block j; [C, C], queries first.

    With `by_key`, keys first.
    """
    mask = q_ids_ref[...] == k_ids_ref[...]
    if causal:
        C = mask.shape[0]
        queries, keys = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        if by_key:
            queries, keys = keys, queries
        mask &= i * C + queries >= j * C + keys
    return mask


def _scores(x, y):
    """The scores of queries and keys [C, H], in either order."""
    return x.shape[1] ** -0.5 * tpu.dot(x, y, contract=(1, 1))
