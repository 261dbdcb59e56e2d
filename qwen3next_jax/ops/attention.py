"""Causal attention with grouped heads, inside documents packed in a row.

    o_t = Σ_s softmax_s(scale · q_t · k_s) v_s      over s ≤ t in t's document

"reference" holds all T · S scores. "chunked" holds one block of them: it walks the lower triangle
of block pairs with a running maximum and sum (Rabe & Staats, arXiv:2112.05682; Dao et al.,
arXiv:2205.14135), so memory grows with T alone and the upper triangle costs nothing. Its backward
pass walks the same pairs with the scores recomputed. Softmax is float32 throughout.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_BLOCK = 128  # small enough that a block's scores stay in a CPU's cache
_SLOTS = 512  # of a cache at a time
_FEW = 16  # queries whose scores with all slots are no burden
# Large and finite: a row whose block is masked as a whole then gets weights of exp(0) that the
# first real score multiplies by zero, where −inf would give NaN. Every token sees itself at last.
_MASKED = -1e30


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K P"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str = "chunked",
) -> Float[Array, "B T N P"]:
    """Attends causally; KV head i serves the N / K neighbouring query heads from i · N / K on.

    Args:
      q, k, v: queries, keys and values; the scale is H**-0.5.
      segment_ids: documents packed in a row, each a contiguous run of one id.
      implementation: "chunked" or "reference".

    Returns:
      Outputs in v's dtype.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation not in ("chunked", "reference"):
        raise ValueError(f"{implementation=} is unknown; expected 'chunked' or 'reference'")
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    if implementation == "chunked":
        out = _chunked(q, k, v, segment_ids)
    else:
        out = _reference(q, k, v, segment_ids)
    return out.reshape(B, T, N, -1)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S P"],
    *,
    query_slots: Int[Array, "B T"],
) -> Float[Array, "B T N P"]:
    """Attends to a cache: each query to the slots up to its own; not differentiable.

    A few queries look at all slots at once. Many walk blocks of slots, as far as the furthest
    query sees, so that memory does not grow with the context and unused slots cost nothing.

    Args:
      q: queries.
      k, v: keys and values by slot, each laid out as the product that reads it is fastest.
      query_slots: the slot of each query.

    Returns:
      Outputs in v's dtype.
    """
    B, T, N, H = q.shape
    K, S = v.shape[1:3]
    # The queries of a KV head are rows of one matrix.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    slots = jnp.tile(query_slots, (1, N // K))[:, None, :, None]
    scale = H**-0.5
    if T <= _FEW:
        scores = jnp.where(jnp.arange(S) <= slots, scale * _dot("bkqh,bkhs->bkqs", q, k), _MASKED)
        weights = jax.nn.softmax(scores, axis=-1)
        out = _dot("bkqs,bksp->bkqp", weights.astype(v.dtype), v)
    else:
        block = min(_SLOTS, S)

        def visit(i, carry):
            # The last block may reach back into the one before it: those slots are masked.
            start = jnp.minimum(i * block, S - block)
            k_block = jax.lax.dynamic_slice_in_dim(k, start, block, axis=3)
            v_block = jax.lax.dynamic_slice_in_dim(v, start, block, axis=2)
            index = start + jnp.arange(block)
            mask = (index <= slots) & (index >= i * block)
            scores = jnp.where(mask, scale * _dot("bkqh,bkhs->bkqs", q, k_block), _MASKED)
            return _add_block(carry, scores, v_block, "bkqs,bksp->bkqp")

        rows = q.shape[:-1]
        start = (jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, _MASKED), jnp.zeros(rows))
        blocks = query_slots.max() // block + 1
        total, _, norm = jax.lax.fori_loop(0, blocks, visit, start)
        out = total / norm[..., None]
    out = out.astype(v.dtype).reshape(B, K, N // K, T, -1)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)


def _reference(q, k, v, segment_ids):
    T = q.shape[1]
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    scores = _dot("btkrh,bskh->bkrts", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1)
    return _dot("bkrts,bskp->btkrp", weights.astype(v.dtype), v).astype(v.dtype)


def _chunked(q, k, v, segment_ids):
    B, T = q.shape[:2]
    block = min(_BLOCK, T)
    padding = -T % block
    if segment_ids is None:
        segment_ids = jnp.zeros((B, T), jnp.int32)

    def split(x):
        """[B, T, heads..., X] → [blocks, B, heads..., block, X]."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(B, -1, block, *x.shape[2:])
        return x.transpose(1, 0, *range(3, x.ndim - 1), 2, x.ndim - 1)

    segments = split(segment_ids[..., None])[..., 0]
    out = _pairs(split(q), split(k), split(v), segments)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T + padding, *q.shape[2:4], -1)[:, :T]


# Blocks below: q, out [Z B K R C H], k, v [Z B K C H], segments [Z B C].


@jax.custom_vjp
def _pairs(q, k, v, segments):
    return _pairs_forward(q, k, v, segments)[0]


def _pairs_forward(q, k, v, segments):
    def visit(carry, pair):
        i, j = pair
        scores, _ = _scores(q, k, segments, i, j)
        after = _add_block(tuple(x[i] for x in carry), scores, v[j], "bkrcd,bkdp->bkrcp")
        return tuple(x.at[i].set(y) for x, y in zip(carry, after, strict=True)), None

    rows = q.shape[:-1]
    start = (
        jnp.zeros((*rows, v.shape[-1]), jnp.float32),
        jnp.full(rows, _MASKED),
        jnp.zeros(rows),
    )
    (total, peak, norm), _ = jax.lax.scan(visit, start, _lower_triangle(q.shape[0]))
    out = (total / norm[..., None]).astype(v.dtype)
    return out, (q, k, v, segments, out, peak + jnp.log(norm))


def _pairs_backward(residuals, d_out):
    q, k, v, segments, out, log_norm = residuals
    balance = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    scale = q.shape[-1] ** -0.5

    def visit(carry, pair):
        d_q, d_k, d_v = carry
        i, j = pair
        scores, mask = _scores(q, k, segments, i, j)
        weights = jnp.where(mask, jnp.exp(scores - log_norm[i][..., None]), 0)
        d_v = d_v.at[j].add(_dot("bkrcd,bkrcp->bkdp", weights.astype(v.dtype), d_out[i]))
        d_weights = _dot("bkrcp,bkdp->bkrcd", d_out[i], v[j])
        d_scores = scale * (weights * (d_weights - balance[i][..., None]))
        d_scores = d_scores.astype(q.dtype)
        d_q = d_q.at[i].add(_dot("bkrcd,bkdh->bkrch", d_scores, k[j]))
        d_k = d_k.at[j].add(_dot("bkrcd,bkrch->bkdh", d_scores, q[i]))
        return (d_q, d_k, d_v), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads, _ = jax.lax.scan(visit, start, _lower_triangle(q.shape[0]))
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_pairs.defvjp(_pairs_forward, _pairs_backward)


def _add_block(carry, scores, v, product):
    """Running sum, maximum and norm of a softmax after one more block of sources."""
    total, peak, norm = carry
    new_peak = jnp.maximum(peak, scores.max(-1))
    weights = jnp.exp(scores - new_peak[..., None])
    shrink = jnp.exp(peak - new_peak)
    total = shrink[..., None] * total + _dot(product, weights.astype(v.dtype), v)
    return total, new_peak, shrink * norm + weights.sum(-1)


def _scores(q, k, segments, i, j):
    """Masked scores of query block i with key block j, and their mask."""
    C = q.shape[-2]
    causal = i * C + jnp.arange(C)[:, None] >= j * C + jnp.arange(C)
    mask = causal & (segments[i][:, :, None] == segments[j][:, None, :])
    mask = mask[:, None, None]
    scores = _dot("bkrch,bkdh->bkrcd", q[i], k[j]) * q.shape[-1] ** -0.5
    return jnp.where(mask, scores, _MASKED), mask


def _lower_triangle(blocks):
    """All pairs i ≥ j, each query block's own last."""
    i, j = np.tril_indices(blocks)
    return i.astype(np.int32), j.astype(np.int32)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
