"""Causal attention with grouped heads, inside documents packed in a row.

    o_t = Σ_s softmax_s(scale · q_t · k_s) v_s      over s ≤ t in t's document

Implementations:
- "reference" materialises all T · S scores.
- "chunked" materialises the scores of one query block and one key block at a time. It visits the
  pairs of the lower triangle with a running maximum and sum (Rabe & Staats, arXiv:2112.05682; Dao
  et al., arXiv:2205.14135), so memory grows linearly with T. Pairs above the diagonal cost nothing,
  nor, in packed rows, do pairs of blocks without a common document. The backward pass visits the
  same pairs and recomputes their scores. When rows are sharded over devices, queries also visit
  key blocks that arrive from other devices (`parallel/context.py`).
- "pallas" is JAX's splash attention, for TPUs (`pallas/attention.py`). Rows sharded over devices
  take kernels of our own there (`pallas/attention_blocks.py`).
- "cudnn" is NVIDIA's flash attention, for its GPUs. It takes documents as a mask of T² entries per
  row, and does not skip masked blocks.

Softmax is float32 throughout.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qwen3next_jax.ops.cpu import once, row_max, row_sum
from qwen3next_jax.ops.pallas.attention import KEPT, splash_attention
from qwen3next_jax.ops.platform import check_implementation, is_hopper, platform
from qwen3next_jax.ops.shapes import (
    check_rows,
    check_shape,
    pad_to_multiple,
    require_floats,
    require_tokens,
)

_BLOCK = 256  # small enough that a block's scores stay in a CPU's cache
# On accelerators a block's products must take longer than fetching the block. On a TPU v5p, by its
# compiler's estimate, 262,144 tokens over 16 chips take 11.7 s with blocks of 128, 1.3 s with 1024
# and 1.1 s with 2048, which materialises four times as many scores.
_ACCELERATOR_BLOCK = 1024
_SLOTS = 512  # cache slots that are read at a time
_MASK_TOKENS = 16_384  # longest row for cuDNN, whose mask is then 0.5 GB
_ONE_SHOT_QUERIES = 16  # up to this many queries, the scores with all cache slots fit memory easily
# Finite, because −inf would give NaN: where a whole block is masked, a query's weights are exp(0),
# and the rescaling at its first unmasked score multiplies them by zero. Every query has such a
# score, because each token attends to itself.
MASKED = -1e30


def default_implementation(tokens: int, key_size: int, value_size: int, dtype: jnp.dtype) -> str:
    """Returns the best implementation for this platform, row length, head sizes and dtype."""
    if platform() == "tpu":
        return "pallas"
    # JAX can use cuDNN only on a machine with a GPU, not when it compiles for one elsewhere.
    if platform() != "gpu" or jax.default_backend() != "gpu" or dtype != jnp.bfloat16:
        return "chunked"
    takes_heads = key_size == value_size and key_size % 8 == 0
    takes_heads &= key_size <= (256 if is_hopper() else 128)
    takes_rows = tokens % 2 == 0 and tokens <= _MASK_TOKENS
    return "cudnn" if takes_heads and takes_rows else "chunked"


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K P"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N P"]:
    """Attends causally; KV head i serves the N / K neighbouring query heads from i · N / K on.

    Args:
      q, k, v: queries, keys and values; the scale is H**-0.5.
      segment_ids: documents packed in a row, each a contiguous run of one id.
      implementation: "chunked", "pallas", "cudnn" or "reference"; None: the platform's default.

    Returns:
      Outputs in v's dtype.

    Raises:
      ValueError: for arrays of other shapes or not of floats, rows without tokens, query heads that
        are no multiple of the KV heads, or an implementation that is unknown or not for this
        platform.
    """
    check_shape("q", q, "B", "T", "N", "H")
    B, T, N, H = q.shape
    check_shape("k", k, B, T, "K", H)
    K = k.shape[2]
    check_shape("v", v, B, T, K, "P")
    require_floats(q=q, k=k, v=v)
    check_rows((B, T), segment_ids=segment_ids)
    if implementation is None:
        implementation = default_implementation(T, H, v.shape[-1], q.dtype)
    check_implementation(implementation, "chunked", "pallas", "cudnn", "reference")
    require_tokens(B, T)
    if N % K:
        raise ValueError(
            f"{N} query heads are not divisible by {K} KV heads; each KV head serves as many"
        )
    if implementation == "pallas":
        if segment_ids is None:
            segment_ids = jnp.zeros((B, T), jnp.int32)
        return splash_attention(q, k, v, segment_ids)
    if implementation == "cudnn":
        return _cudnn(q, k, v, segment_ids)
    q = q.reshape(B, T, K, N // K, H)
    if implementation == "chunked":
        out = _chunked(q, k, v, segment_ids)
    else:
        out = _reference(q, k, v, segment_ids)
    return out.reshape(B, T, N, -1)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K P"],
    *,
    cached_k: Float[Array, "B K H S"],
    cached_v: Float[Array, "B K S P"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B T N P"]:
    """Attends to a cache and, causally, to the T tokens that follow it; not differentiable.

    The new tokens' keys and values are separate arguments, so that the caller can write them to the
    cache afterwards: XLA:CPU copies the whole buffer if it is written first and then read.

    Up to `_ONE_SHOT_QUERIES` queries attend to all slots at once. More queries loop over blocks of
    slots, up to the longest row's length, so that memory does not grow with the context and unused
    slots cost nothing.

    Args:
      q, k, v: queries, keys and values of the new tokens.
      cached_k, cached_v: keys and values by slot, each in its product's fastest layout, and in any
        dtype.
      lengths: number of filled slots of each row; the contents of later slots are ignored.

    Returns:
      Outputs in v's dtype.
    """
    B, T, N, H = q.shape
    K, S = cached_v.shape[1:3]
    # The queries of a KV head are rows of one matrix.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    filled = lengths[:, None, None, None]
    causal = np.tile(np.tril(np.ones((T, T), bool)), (N // K, 1))

    def scores(k, product, mask):
        return jnp.where(mask, H**-0.5 * _dot(product, q.astype(k.dtype), k), MASKED)

    new_scores = scores(k, "bkqh,bskh->bkqs", causal)
    if T <= _ONE_SHOT_QUERIES:
        old_scores = scores(cached_k, "bkqh,bkhs->bkqs", jnp.arange(S) < filled)
        weights = jax.nn.softmax(jnp.concatenate([old_scores, new_scores], -1), axis=-1)
        out = _dot("bkqs,bksp->bkqp", weights[..., :S].astype(cached_v.dtype), cached_v)
        out += _dot("bkqs,bskp->bkqp", weights[..., S:].astype(v.dtype), v)
    else:
        block = min(_SLOTS, S)

        def visit(i, carry):
            # The last block may overlap the one before it; the shared slots are masked.
            start = jnp.minimum(i * block, S - block)
            k_block = jax.lax.dynamic_slice_in_dim(cached_k, start, block, axis=3)
            v_block = jax.lax.dynamic_slice_in_dim(cached_v, start, block, axis=2)
            index = start + jnp.arange(block)
            mask = (index < filled) & (index >= i * block)
            old_scores = scores(k_block, "bkqh,bkhs->bkqs", mask)
            return _add_block(carry, old_scores, v_block, "bkqs,bksp->bkqp")

        blocks = (lengths.max() + block - 1) // block
        carry = jax.lax.fori_loop(0, blocks, visit, init_carry(q, v))
        total, _, denominator = _add_block(carry, new_scores, v, "bkqs,bskp->bkqp")
        out = total / denominator[..., None]
    out = out.astype(v.dtype).reshape(B, K, N // K, T, -1)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def _reference(q, k, v, segment_ids):
    T = q.shape[1]
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    scores = _dot("bqkrh,bskh->bkrqs", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    return _dot("bkrqs,bskp->bqkrp", weights.astype(v.dtype), v).astype(v.dtype)


def _cudnn(q, k, v, segment_ids):
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    return checkpoint_name(out, KEPT)


def _chunked(q, k, v, segment_ids):
    T = q.shape[1]
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    q, k, v, segments = (split_blocks(x) for x in (q, k, v, segment_ids))
    return join_blocks(_pairs(q, k, v, segments), T)


def split_blocks(x: Array, block: int | None = None) -> Array:
    """[B, T, heads..., X] → [Z, B, heads..., C, X], and segment ids [B, T] → [Z, B, C].

    A block has `block` tokens (None: as many as "chunked" takes on this platform), or all if there
    are fewer. The last one is padded with -1, which is not the segment id of any document.
    """
    T = x.shape[1]
    if x.ndim == 2:
        x = x.astype(jnp.int32)  # in an unsigned dtype -1 would be an id
    if block is None:
        block = _BLOCK if platform() == "cpu" else _ACCELERATOR_BLOCK
    block = min(block, T)
    x = pad_to_multiple(x, block, constant_values=-1)
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    if x.ndim == 3:
        return x.swapaxes(0, 1)
    return x.transpose(1, 0, *range(3, x.ndim - 1), 2, x.ndim - 1)


def join_blocks(x: Array, tokens: int) -> Array:
    """[Z, B, heads..., C, X] → [B, T, heads..., X], with the padding after T tokens removed."""
    x = x.transpose(1, 0, x.ndim - 2, *range(2, x.ndim - 2), x.ndim - 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


# Shapes of blocks below: q [Z B K R C H], out [Z B K R C P], k [Z B K C H], v [Z B K C P],
# segments [Z B C]. In einsums q stands for the queries of a block and s for its sources.


@jax.custom_vjp
def _pairs(q, k, v, segments):
    return _pairs_forward(q, k, v, segments)[0]


def _pairs_forward(q, k, v, segments):
    own = causal_pairs(q.shape[0])
    carry = accumulate(init_carry(q, v), q, k, v, segments, segments, own, causal=True)
    out, lse = finalize(carry, v.dtype)
    return out, (q, k, v, segments, out, lse)


def _pairs_backward(residuals, d_out):
    q, k, v, segments, out, lse = residuals
    d_q, delta, own = jnp.zeros(q.shape, jnp.float32), out_dot(out, d_out), causal_pairs(q.shape[0])
    grads = accumulate_gradients(
        d_q, q, k, v, segments, segments, lse, delta, d_out, own, causal=True
    )
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_pairs.defvjp(_pairs_forward, _pairs_backward)


def causal_pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a query block i and a key block j ≤ i; pair (i, i) is the last one of block i.

    Args:
      blocks: number of blocks Z.

    Returns:
      The indices i and j of the pairs, int32 [Z · (Z + 1) / 2] each.
    """
    i, j = np.tril_indices(blocks)
    return i.astype(np.int32), j.astype(np.int32)


def init_carry(
    q: Float[Array, "*rows H"], v: Float[Array, "*blocks P"]
) -> tuple[Float[Array, "*rows P"], Float[Array, "*rows"], Float[Array, "*rows"]]:
    """The softmax state of queries that have not attended to anything yet.

    Returns:
      The weighted sum of values, the running maximum of the scores and the softmax denominator, all
      float32.
    """
    rows = q.shape[:-1]
    total = jnp.zeros((*rows, v.shape[-1]), jnp.float32)
    return total, jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)


Carry = tuple[
    Float[Array, "Z B K R C P"], Float[Array, "Z B K R C"], Float[Array, "Z B K R C"]
]  # as `init_carry` returns it
Pairs = tuple[Int[Array | np.ndarray, "pairs"], Int[Array | np.ndarray, "pairs"]]


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
    """Updates the running softmax with the given pairs of query blocks and key blocks.

    Args:
      carry: state from `init_carry` or an earlier call.
      q: query blocks.
      k, v: key and value blocks, which may be of other tokens than the queries.
      q_segments, k_segments: segment ids of queries and of keys; pairs of blocks
        that `meet` in no row are skipped.
      pairs: block indices (i, j) into q and into k. Over all calls together, every query must
        attend to itself once.
      causal: True if k's blocks are of q's own tokens, so that later tokens must be masked.

    Returns:
      The updated state.
    """
    R, C, H = q.shape[3:]
    q, k_t = _merge_query_heads(q), k.swapaxes(-1, -2)
    sources, first, end = _sources_by_query_block(q_segments, k_segments, pairs)

    def visit_sources(block):
        rows, q, segments, i, first, end = block

        def visit(n, rows):
            j = sources[n]
            scores = H**-0.5 * _dot("bkqh,bkhs->bkqs", q, k_t[j])
            scores = scores.reshape(*scores.shape[:2], R, C, -1)
            mask = _mask(i, j, segments, k_segments[j], causal)
            scores = jnp.where(mask, scores, MASKED)
            return _add_block(rows, scores, v[j], "bkrqs,bksp->bkrqp")

        return jax.lax.fori_loop(first, end, visit, rows)

    return jax.lax.map(visit_sources, (carry, q, q_segments, jnp.arange(len(q)), first, end))


def finalize(
    carry: Carry, dtype: jnp.dtype
) -> tuple[Float[Array, "Z B K R C P"], Float[Array, "Z B K R C"]]:
    """Normalises the weighted sums; both results are needed in the backward pass.

    Args:
      carry: state after all calls of `accumulate`.
      dtype: dtype of the outputs.

    Returns:
      Outputs, and the float32 logsumexp of each query's scores; both have the checkpoint name
      `KEPT`.
    """
    total, running_max, denominator = carry
    out = (total / denominator[..., None]).astype(dtype)
    lse = running_max + jnp.log(denominator)
    return checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)


def out_dot(
    out: Float[Array, "Z B K R C P"], d_out: Float[Array, "Z B K R C P"]
) -> Float[Array, "Z B K R C"]:
    """Returns out · d_out of each query in float32: what its softmax's gradient subtracts."""
    return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)


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
    """Backpropagates through the given pairs of query blocks and key blocks.

    Args:
      d_q: gradient of q from the pairs of earlier calls, float32.
      q, k, v, q_segments, k_segments, pairs, causal: arguments of `accumulate`.
      lse: a result of `finalize`.
      delta: `out_dot` of the other result and its gradient.
      d_out: gradient of the outputs.

    Returns:
      d_q with the contribution of these pairs added, and their gradients of k and v; all float32.
    """
    # Scores are [sources, queries] here, and d_q is transposed, so that no product in the loop has
    # to transpose an operand; the others are transposed once, before the loop. The query heads of a
    # KV head are merged into one axis, because a product that sums over two axes would transpose.
    R, C, H = q.shape[3:]
    q, d_q, d_out = (_merge_query_heads(x) for x in (q, d_q, d_out))
    d_q = d_q.swapaxes(-1, -2)
    q_t, k_t, d_out_t = (x.swapaxes(-1, -2) for x in (q, k, d_out))

    sources, first, end = _sources_by_query_block(q_segments, k_segments, pairs)

    def split(x):
        return x.reshape(*x.shape[:3], R, C)

    def visit_sources(d_kv, block):
        d_q, q, q_t, d_out, d_out_t, lse, delta, segments, i, first, end = block

        def visit(n, grads):
            d_q, d_k, d_v = grads
            j = sources[n]
            scores = split(H**-0.5 * _dot("bksh,bkhq->bksq", k[j], q_t))
            mask = _mask(i, j, segments, k_segments[j], causal, by_key=True)
            weights = jnp.exp(jnp.where(mask, scores, MASKED) - lse[:, :, None])
            d_weights = split(_dot("bksp,bkpq->bksq", v[j], d_out_t))
            d_scores = H**-0.5 * (weights * (d_weights - delta[:, :, None]))
            weights = weights.astype(v.dtype).reshape(*weights.shape[:3], R * C)
            d_scores = d_scores.astype(q.dtype).reshape(weights.shape)
            d_q += _dot("bkhs,bksq->bkhq", k_t[j], d_scores)
            d_k = d_k.at[j].add(_dot("bksq,bkqh->bksh", d_scores, q))
            d_v = d_v.at[j].add(_dot("bksq,bkqp->bksp", weights, d_out))
            return d_q, d_k, d_v

        d_q, *d_kv = jax.lax.fori_loop(first, end, visit, (d_q, *d_kv))
        return tuple(d_kv), d_q

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    blocks = d_q, q, q_t, d_out, d_out_t, lse, delta, q_segments, jnp.arange(len(q)), first, end
    (d_k, d_v), d_q = jax.lax.scan(visit_sources, start, blocks)
    return d_q.swapaxes(-1, -2).reshape(*d_q.shape[:3], R, C, H), d_k, d_v


def meet(
    q_segments: Int[Array, "Z B C"], k_segments: Int[Array, "Z B C"], pairs: Pairs
) -> Bool[Array, "pairs B"]:
    """Marks pairs of blocks that may have a document in common, for each row.

    Blocks whose ranges of ids are disjoint have none. Where ids grow along a row, as packing
    numbers documents from one on, these are all that have none; other ids may leave some that are
    masked as a whole.

    Args:
      q_segments, k_segments, pairs: arguments of `accumulate`.
    """
    # Padding, 0 and -1, comes behind all documents.
    q_ids, k_ids = (
        jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max) for ids in (q_segments, k_segments)
    )
    i, j = pairs
    starts_before = q_ids.min(-1)[i] <= k_ids.max(-1)[j]
    return starts_before & (k_ids.min(-1)[j] <= q_ids.max(-1)[i])


def _sources_by_query_block(q_segments, k_segments, pairs):
    """Orders pairs by query block, without those that `meet` in no row.

    Returns:
      The key blocks of all pairs, and for each query block where its first one is among them and
      where its last one ends.
    """
    i, j = pairs
    i = jnp.where(meet(q_segments, k_segments, pairs).any(-1), i, len(q_segments))
    order = jnp.argsort(i)
    starts = jnp.searchsorted(i[order], jnp.arange(len(q_segments) + 1))
    return jnp.asarray(j)[order], starts[:-1], starts[1:]


def _merge_query_heads(x):
    """[Z, B, K, R, C, H] → [Z, B, K, R · C, H]."""
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _add_block(carry, scores, v, product):
    """Updates weighted sum, running maximum and softmax denominator with one block of sources."""
    total, running_max, denominator = carry
    new_max = jnp.maximum(running_max, row_max(scores))
    weights = jnp.exp(scores - new_max[..., None])
    rescale = jnp.exp(running_max - new_max)
    total = rescale[..., None] * total + _dot(product, weights.astype(v.dtype), v)
    return total, new_max, rescale * denominator + row_sum(weights)


def _mask(i, j, q_segments, k_segments, causal, *, by_key=False):
    """True where a query of query block i may attend to a source of key block j.

    Returns:
      Booleans [B, 1, 1, C, S] for C queries and S sources; with `by_key` [B, 1, S, 1, C].
    """

    def rows(x):
        return x[..., None]

    def columns(x):
        return x[..., None, :]

    queries, sources = (columns, rows) if by_key else (rows, columns)

    def compare(q_segments, k_segments):
        C, S = q_segments.shape[1], k_segments.shape[1]
        mask = queries(q_segments) == sources(k_segments)
        if causal:
            mask &= queries(i * C + jnp.arange(C)) >= sources(j * S + jnp.arange(S))
        return mask

    # Each of the operations that read the mask would otherwise compare again.
    mask = once(compare, q_segments, k_segments)
    return mask[:, None, :, None] if by_key else mask[:, None, None]


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
