"""Causal attention with grouped heads, inside documents packed in a row.

    o_t = Σ_s softmax_s(scale · q_t · k_s) v_s      over s ≤ t in t's document

Implementations:
- "reference" holds all T · S scores.
- "chunked" holds the scores of one pair of blocks, of queries and of keys. It visits the pairs of
  the lower triangle with a running maximum and sum (Rabe & Staats, arXiv:2112.05682; Dao et al.,
  arXiv:2205.14135), so memory grows linearly with T. Pairs above the diagonal cost nothing, nor do
  pairs of blocks without a common document. The backward pass visits the same pairs and recomputes
  their scores. Queries can also visit blocks of keys from other devices, for rows of which each
  device holds a part (`parallel/context.py`).
- "pallas" is JAX's splash attention, for TPUs (`pallas/attention.py`).
- "cudnn" is NVIDIA's flash attention, for its GPUs. It takes documents as a mask of T² numbers for
  each row, and multiplies masked blocks too.

Softmax is float32 throughout.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.cpu import row_max, row_sum
from qwen3next_jax.ops.pallas.attention import KEPT, splash_attention
from qwen3next_jax.ops.platform import check_platform, is_hopper, platform
from qwen3next_jax.ops.shapes import check_rows, check_shape, require_tokens

_BLOCK = 256  # small enough that a block's scores stay in a CPU's cache
# Elsewhere a block's products must outlast what it takes to fetch the block: on a TPU v5p by its
# compiler's estimate, 262,144 tokens over 16 chips take 11.7 s with 128, 1.3 with 1024, 1.1 with
# 2048, which holds four times the scores.
_ACCELERATOR_BLOCK = 1024
_SLOTS = 512  # of a cache at a time
_MASK_TOKENS = 16_384  # of a row, whose mask for cuDNN is 0.5 GB
_FEW = 16  # queries whose scores with all slots fit memory easily
# Finite, because −inf would give NaN: a query for which a whole block is masked gets weights exp(0)
# there, which its first real score multiplies by zero. There is one, as every token sees itself.
_MASKED = -1e30


def default_implementation(tokens: int, key_size: int, value_size: int, dtype: jnp.dtype) -> str:
    """The implementation that suits the platform, rows of so many tokens, and heads."""
    if platform() == "tpu":
        return "pallas"
    # Whether cuDNN is there can be asked only on the machine that it is on.
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
      ValueError: for arrays of other shapes, rows without tokens, query heads that are no multiple
        of the KV heads, or an implementation that is unknown or not for this platform.
    """
    check_shape("q", q, "B", "T", "N", "H")
    B, T, N, H = q.shape
    check_shape("k", k, B, T, "K", H)
    K = k.shape[2]
    check_shape("v", v, B, T, K, "P")
    check_rows((B, T), segment_ids=segment_ids)
    if implementation is None:
        implementation = default_implementation(T, H, v.shape[-1], q.dtype)
    if implementation not in ("chunked", "pallas", "cudnn", "reference"):
        raise ValueError(
            f"{implementation=} is unknown; expected 'chunked', 'pallas', 'cudnn' or 'reference'"
        )
    require_tokens(B, T)
    if N % K:
        raise ValueError(f"{N} query heads are not divisible by {K} KV heads")
    if implementation in ("pallas", "cudnn"):
        check_platform(implementation)
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
    """Attends to a cache and, causally, to the T tokens behind it; not differentiable.

    The new tokens are taken apart from the cache so that they can be written to it afterwards: a
    buffer that is written first and then read is copied as a whole by XLA's CPU backend.

    A few queries look at all slots at once. Many walk blocks of slots, as far as any row's cache
    is filled, so that memory does not grow with the context and unused slots cost nothing.

    Args:
      q, k, v: of the new tokens.
      cached_k, cached_v: by slot, each laid out as the product that reads it is fastest.
      lengths: of each row, how many slots are filled; what lies in later ones does not matter.

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
        return jnp.where(mask, H**-0.5 * _dot(product, q, k), _MASKED)

    new_scores = scores(k, "bkqh,btkh->bkqt", causal)
    if T <= _FEW:
        old_scores = scores(cached_k, "bkqh,bkhs->bkqs", jnp.arange(S) < filled)
        weights = jax.nn.softmax(jnp.concatenate([old_scores, new_scores], -1), axis=-1)
        weights = weights.astype(v.dtype)
        out = _dot("bkqs,bksp->bkqp", weights[..., :S], cached_v)
        out += _dot("bkqt,btkp->bkqp", weights[..., S:], v)
    else:
        block = min(_SLOTS, S)

        def visit(i, carry):
            # The last block may reach back into the one before it: those slots are masked.
            start = jnp.minimum(i * block, S - block)
            k_block = jax.lax.dynamic_slice_in_dim(cached_k, start, block, axis=3)
            v_block = jax.lax.dynamic_slice_in_dim(cached_v, start, block, axis=2)
            index = start + jnp.arange(block)
            mask = (index < filled) & (index >= i * block)
            old_scores = scores(k_block, "bkqh,bkhs->bkqs", mask)
            return _add_block(carry, old_scores, v_block, "bkqs,bksp->bkqp")

        blocks = (lengths.max() + block - 1) // block
        carry = jax.lax.fori_loop(0, blocks, visit, no_pairs(q, v))
        total, _, norm = _add_block(carry, new_scores, v, "bkqt,btkp->bkqp")
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


def split_blocks(x: Array) -> Array:
    """[B, T, heads..., X] → [Z, B, heads..., C, X], and segment ids [B, T] → [Z, B, C].

    The last block is padded with -1, which as an id is no document's.
    """
    T = x.shape[1]
    block = min(_BLOCK if platform() == "cpu" else _ACCELERATOR_BLOCK, T)
    x = jnp.pad(x, [(0, 0), (0, -T % block)] + [(0, 0)] * (x.ndim - 2), constant_values=-1)
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    if x.ndim == 3:
        return x.swapaxes(0, 1)
    return x.transpose(1, 0, *range(3, x.ndim - 1), 2, x.ndim - 1)


def join_blocks(x: Array, tokens: int) -> Array:
    """[Z, B, heads..., C, X] → [B, T, heads..., X], without what lies beyond T tokens."""
    x = x.transpose(1, 0, x.ndim - 2, *range(2, x.ndim - 2), x.ndim - 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


# Blocks below: q, out [Z B K R C H], k, v [Z B K C H], segments [Z B C].


@jax.custom_vjp
def _pairs(q, k, v, segments):
    return _pairs_forward(q, k, v, segments)[0]


def _pairs_forward(q, k, v, segments):
    own = causal_pairs(q.shape[0])
    carry = add_pairs(no_pairs(q, v), q, k, v, segments, segments, own, causal=True)
    out, log_norm = normalize(carry, v.dtype)
    return out, (q, k, v, segments, out, log_norm)


def _pairs_backward(residuals, d_out):
    q, k, v, segments, out, log_norm = residuals
    d_q = jnp.zeros(q.shape, jnp.float32)
    grads = add_pair_gradients(
        d_q, q, k, v, segments, segments, log_norm, out, d_out, causal_pairs(q.shape[0]),
        causal=True,
    )  # fmt: skip
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_pairs.defvjp(_pairs_forward, _pairs_backward)


def causal_pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) of a query block and a key block with i ≥ j, each query block's own last."""
    i, j = np.tril_indices(blocks)
    return i.astype(np.int32), j.astype(np.int32)


def no_pairs(q: Array, v: Array) -> tuple[Array, Array, Array]:
    """Running sum, maximum and norm of each query's softmax before it has seen anything."""
    rows = q.shape[:-1]
    total = jnp.zeros((*rows, v.shape[-1]), jnp.float32)
    return total, jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)


def add_pairs(carry, q, k, v, q_segments, k_segments, pairs, *, causal):
    """Running sum, maximum and norm after the given pairs of query blocks and key blocks.

    Args:
      carry: from `no_pairs` or an earlier call.
      q: queries' blocks.
      k, v: keys' and values' blocks, which may be other tokens than q's.
      q_segments, k_segments: documents of both; a pair without a common one is skipped.
      pairs: indices (i, j) of blocks; each query has to see itself once, in whatever call.
      causal: whether k's blocks are q's own, so that later tokens are to be masked.
    """
    # Masks depend on no layer: differentiating a scan over layers, JAX would take them out of it
    # and keep those of all pairs, which are as many as all scores. After this they depend on q.
    q, *rest = jax.lax.optimization_barrier((q, q_segments, k_segments, *pairs))
    q_segments, k_segments, *pairs = rest
    R, C, H = q.shape[3:]
    q, turned_k = _one_after_another(q), k.swapaxes(-1, -2)

    def visit(carry, pair):
        i, j = pair
        mask = _mask(q_segments[i], k_segments[j], i, j, causal)

        def attend(rows):
            scores = H**-0.5 * _dot("bksh,bkhd->bksd", q[i], turned_k[j])
            scores = scores.reshape(*scores.shape[:2], R, C, -1)
            scores = jnp.where(mask, scores, _MASKED)
            return _add_block(rows, scores, v[j], "bkrcd,bkdp->bkrcp")

        rows = tuple(x[i] for x in carry)
        rows = jax.lax.cond(mask.any(), attend, lambda rows: rows, rows)
        return tuple(x.at[i].set(y) for x, y in zip(carry, rows, strict=True)), None

    return jax.lax.scan(visit, carry, pairs)[0]


def normalize(carry, dtype):
    """What the backward pass needs, named `KEPT`: outputs, the logarithm of each query's norm."""
    total, peak, norm = carry
    out = (total / norm[..., None]).astype(dtype)
    return checkpoint_name(out, KEPT), checkpoint_name(peak + jnp.log(norm), KEPT)


def add_pair_gradients(
    d_q, q, k, v, q_segments, k_segments, log_norm, out, d_out, pairs, *, causal
):
    """Gradients through the given pairs: d_q with theirs added, and those of k and v; float32."""
    balance = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    # Scores have keys as rows and queries as columns here, and so has d_q's transpose: then all
    # products take them as they are. What else they would turn around, pair by pair, is turned
    # once, and the queries of a key head are one axis: products turn around what they sum over two.
    R, C, H = q.shape[3:]
    q, d_q, d_out = (_one_after_another(x) for x in (q, d_q, d_out))
    d_q = d_q.swapaxes(-1, -2)
    turned_q, turned_k, turned_d_out = (x.swapaxes(-1, -2) for x in (q, k, d_out))

    def visit(carry, pair):
        i, j = pair
        mask = _mask(q_segments[i], k_segments[j], i, j, causal, by_key=True)

        def split(x):
            return x.reshape(*x.shape[:3], R, C)

        def attend(rows):
            d_q, d_k, d_v = rows
            scores = split(H**-0.5 * _dot("bkdh,bkhs->bkds", k[j], turned_q[i]))
            weights = jnp.exp(jnp.where(mask, scores, _MASKED) - log_norm[i][:, :, None])
            d_weights = split(_dot("bkdp,bkps->bkds", v[j], turned_d_out[i]))
            d_scores = H**-0.5 * (weights * (d_weights - balance[i][:, :, None]))
            weights = weights.astype(v.dtype).reshape(*weights.shape[:3], R * C)
            d_scores = d_scores.astype(q.dtype).reshape(weights.shape)
            d_q += _dot("bkhd,bkds->bkhs", turned_k[j], d_scores)
            d_k += _dot("bkds,bksh->bkdh", d_scores, q[i])
            d_v += _dot("bkds,bksp->bkdp", weights, d_out[i])
            return d_q, d_k, d_v

        rows = tuple(x[n] for x, n in zip(carry, (i, j, j), strict=True))
        rows = jax.lax.cond(mask.any(), attend, lambda rows: rows, rows)
        return tuple(x.at[n].set(y) for x, n, y in zip(carry, (i, j, j), rows, strict=True)), None

    start = (d_q, jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (d_q, d_k, d_v), _ = jax.lax.scan(visit, start, pairs)
    return d_q.swapaxes(-1, -2).reshape(*d_q.shape[:3], R, C, H), d_k, d_v


def _one_after_another(x):
    """The queries of each key head: [Z, B, K, R, C, H] → [Z, B, K, R C, H]."""
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _add_block(carry, scores, v, product):
    """Running sum, maximum and norm of a softmax after one more block of sources."""
    total, peak, norm = carry
    new_peak = jnp.maximum(peak, row_max(scores))
    weights = jnp.exp(scores - new_peak[..., None])
    shrink = jnp.exp(peak - new_peak)
    total = shrink[..., None] * total + _dot(product, weights.astype(v.dtype), v)
    return total, new_peak, shrink * norm + row_sum(weights)


def _mask(q_segments, k_segments, i, j, causal, *, by_key=False):
    """Which of key block j's tokens those of query block i may look at.

    [B, 1, 1, C, D] of C queries and D keys; `by_key` [B, 1, D, 1, C].
    """

    def rows(x):
        return x[..., None]

    def columns(x):
        return x[..., None, :]

    queries, keys = (columns, rows) if by_key else (rows, columns)
    C, D = q_segments.shape[1], k_segments.shape[1]
    mask = queries(q_segments) == keys(k_segments)
    if causal:
        mask &= queries(i * C + jnp.arange(C)) >= keys(j * D + jnp.arange(D))
    return mask[:, None, :, None] if by_key else mask[:, None, None]


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
