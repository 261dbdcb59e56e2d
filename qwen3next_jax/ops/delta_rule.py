"""The gated delta rule: a fast-weight memory that is decayed, corrected and read at each token.

    S_t = exp(g_t) (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t

Token by token this is a loop over T. Chunk by chunk (C tokens, at most 64) it is matrix products.
With the decays Γ_ij = exp(Σ_{j<l≤i} g_l) from token j to token i ≥ j of a chunk, γ_i from the
chunk's start through token i, d_i from token i to the chunk's end, and γ_C over the whole chunk,

    L  = I + stril(β ⊙ (K Kᵀ ⊙ Γ))        Vn = L⁻¹ (β ⊙ (V − γ ⊙ K S))
    O  = γ ⊙ Q S + tril(Q Kᵀ ⊙ Γ) Vn      S' = γ_C S + Kᵀ (d ⊙ Vn)

Numerical hazards; everything here is computed in float32, whatever the inputs' dtype is:
- Every exponent is a sum of the g's that it spans, never a difference of two running sums: if one
  token's g is −30 and another's −0.05, the difference has no significant digits left. The gradient
  of g is summed the same way, from the gradients of the exponents.
- Exponents are masked before `exp`; masked entries would overflow and make the gradients NaN.
- L⁻¹ is built from inverses of diagonal blocks, doubled in size. The power series of (I − L) is
  exact in exact arithmetic, but loses all accuracy when keys are correlated.
- Documents packed in a row end anywhere in a chunk: Γ, γ, d and γ_C are zero across a boundary.

A row may be sharded into stretches on different devices (`gated_delta_rule_stretch`). A stretch
maps its incoming state S to M S + B, with M the product of its tokens' exp(g)(I − β k kᵀ): any
implementation gives M as the state after the stretch if the state before is I and values are zero,
and B if the state before is zero (on the first stretch, the row's). So each device first computes
its M and B, then receives its incoming state, then computes outputs. The maps are composed across
devices by a scan that the caller passes in. In the backward pass the gradients of states flow
through Mᵀ in the same way: a first pass gives what the stretch adds to them, a second one all
gradients. The alternative is to carry H more columns through one pass and compute the outputs from
them, which takes twice the memory for states and a backward pass of its own for each
implementation.

"chunked" consists of XLA operations, for all platforms. "pallas" computes the same in kernels that
keep the states in a TPU's vector memory (`pallas/delta_rule.py`). "hopper" uses XLA operations
inside chunks, and kernels for NVIDIA's H100 and H200 for the recurrence over chunks
(`pallas/delta_hopper.py`). "reference" is the loop over tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.cpu import axis_sum, once, small_products
from qwen3next_jax.ops.pallas import delta_hopper
from qwen3next_jax.ops.pallas import delta_rule as kernels
from qwen3next_jax.ops.pallas.delta_rule import CHUNK
from qwen3next_jax.ops.platform import check_implementation, is_hopper, platform
from qwen3next_jax.ops.shapes import (
    check_rows,
    check_shape,
    pad_to_multiple,
    refuse_explicit,
    require_floats,
    require_tokens,
)

_BLOCK = 16  # size of the diagonal blocks of L that are inverted row by row, then merged
# Products inside a chunk, on which the inverse and the gradients of exponents depend, need more
# than one bfloat16 pass on a TPU. Products with the state use the caller's default precision. On a
# GPU both are TensorFloat-32.
_HIGH = jax.lax.Precision.HIGH
_HIGHEST = jax.lax.Precision.HIGHEST


def default_implementation(key_size: int, value_size: int, dtype: jnp.dtype) -> str:
    """Returns the best implementation for this platform, the heads' sizes and the values' dtype."""
    if is_hopper() and delta_hopper.fits(key_size, value_size, dtype):
        return "hopper"
    return "pallas" if platform() == "tpu" else "chunked"


def gated_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    *,
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H P"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Applies S_t = exp(g_t)(I − β_t k_t k_tᵀ)S_{t−1} + β_t k_t v_tᵀ; o_t = S_tᵀ q_t.

    Key head i serves the N / K neighbouring value heads from i · N / K on.

    Args:
      q, k: L2-normalised; q is already scaled by H**-0.5.
      v: values.
      log_decay: g, natural logarithm per token, from −∞ to 0.
      beta: write strength, in [0, 1].
      segment_ids: documents packed in a row, each a contiguous run of one id; each starts with a
        zero state. 0 is padding, which neither reads nor changes the state. None: one document.
      initial_state: the state before the first document's first token; zeros when None.
      implementation: "chunked" (matrix products, own backward pass), "pallas" (the same in kernels
        for TPUs), "hopper" (in bfloat16, in kernels for H100 and H200) or "reference" (token by
        token; also for single steps). None: the platform's default.

    Returns:
      Outputs in v's dtype, zero at padding, and the state after the last document in float32.

    Raises:
      ValueError: for arrays of other shapes or not of floats, rows without tokens, value heads that
        are no multiple of the key heads, or an implementation that is unknown or not for this
        platform or these heads.

    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464.
    """
    arrays = q, k, v, log_decay, beta
    return _apply(arrays, segment_ids, initial_state, implementation=implementation)


Scan = Callable[..., Any]


def gated_delta_rule_stretch(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    *,
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"] | None,
    initial_state: Float[Array, "B N H P"] | None,
    implementation: str | None,
    scan: Scan,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Applies `gated_delta_rule` to one stretch of rows that are sharded over devices.

    Args:
      q, k, v, log_decay, beta, segment_ids: arguments of `gated_delta_rule`, for this stretch.
      initial_state: state before the row on the row's first stretch; zeros or None on the others.
      implementation: argument of `gated_delta_rule`.
      scan: function `scan(combine, x, reverse=False)`. It returns the x of all stretches before
        this one, combined pairwise by the associative `combine(earlier, later)`, and zeros on the
        first stretch; with `reverse`, of all stretches after this one. Zeros as `earlier` must
        leave `later` unchanged.

    Returns:
      Outputs of this stretch in v's dtype, and the state after it in float32.
    """
    before = None
    if segment_ids is not None:
        # The incoming state is that of the last document that has a token before this stretch.
        last = _spread_over_padding(segment_ids, jnp.zeros(len(q), jnp.int32))[:, -1]
        before = scan(lambda earlier, later: jnp.where(later == 0, earlier, later), last)
    arrays = q, k, v, log_decay, beta
    return _apply(
        arrays,
        segment_ids,
        initial_state,
        before=before,
        implementation=implementation,
        scan=scan,
    )


def _apply(arrays, segment_ids, initial_state, *, implementation, before=None, scan=None):
    """Checks and masks the arguments of an implementation and runs it in float32.

    `before` [B] is the segment id of the document that the incoming state belongs to; 0 or None:
    none.
    """
    q, k, v, log_decay, beta = arrays
    implementations = {
        "chunked": _chunked,
        "pallas": kernels.delta_rule,
        "hopper": _by_hopper,
        "reference": _recurrent,
    }
    check_shape("q", q, "B", "T", "K", "H")
    B, T, K, H = q.shape
    require_tokens(B, T)
    check_shape("k", k, B, T, K, H)
    check_shape("v", v, B, T, "N", "P")
    N, P = v.shape[2:]
    check_shape("log_decay", log_decay, B, T, N)
    check_shape("beta", beta, B, T, N)
    require_floats(q=q, k=k, v=v, log_decay=log_decay, beta=beta)
    check_rows((B, T), segment_ids=segment_ids)
    if initial_state is not None:
        check_shape("initial_state", initial_state, B, N, H, P)
        require_floats(initial_state=initial_state)
    if N % K:
        raise ValueError(
            f"{N} value heads are not divisible by {K} key heads; each key head serves as many"
        )
    if implementation is None:
        implementation = default_implementation(H, P, v.dtype)
    check_implementation(implementation, *implementations)
    if implementation != "reference":  # the others reshape
        refuse_explicit(jax.typeof(q).sharding.mesh)

    if before is None:
        before = jnp.zeros(B, jnp.int32)
    real = None
    if segment_ids is None:
        segments = jnp.zeros((B, T), jnp.int32)
    else:
        real = segment_ids != 0
        log_decay = jnp.where(real[..., None], log_decay, 0)
        beta = jnp.where(real[..., None], beta, 0)
        segments = _spread_over_padding(segment_ids, before)
    # Without a document before, the initial state belongs to the first document.
    before = jnp.where(before == 0, segments[:, 0], before)
    if initial_state is None:
        initial_state = jnp.zeros((B, N, H, P), jnp.float32)

    # The kernels multiply bfloat16 values as they are and document their precision; the other
    # implementations compute everything in float32.
    bfloat16 = implementation in ("pallas", "hopper") and v.dtype == jnp.bfloat16
    q, k, values = (x.astype(jnp.bfloat16 if bfloat16 else jnp.float32) for x in (q, k, v))
    g, beta, state = (x.astype(jnp.float32) for x in (log_decay, beta, initial_state))
    g = jnp.maximum(g, -1e30)  # spans are products with masks of 0 and 1, and 0 · −∞ is NaN
    compute = implementations[implementation]
    if scan is not None:
        compute = functools.partial(_stretch, compute, scan)
    out, state = compute(q, k, values, g, beta, segments, before, state)
    if real is not None:
        out = _where_real(out, real)
    return out.astype(v.dtype), state


def _masked(x, real):
    """Zeroes x [B, T, N, P] at padding."""
    # Without the barrier, XLA hoists the broadcast mask, which is as large as x, out of a scan over
    # layers, or JAX saves it for each layer.
    x, real = jax.lax.optimization_barrier((x, real))
    return jnp.where(real[..., None, None], x, 0)


# Forward and backward rule are plain code, so that they can be differentiated once more.
_where_real = jax.custom_vjp(_masked)
_where_real.defvjp(
    lambda x, real: (_masked(x, real), real), lambda real, d_x: (_masked(d_x, real), None)
)


def _spread_over_padding(
    segment_ids: Int[Array, "B T"], before: Int[Array, "B"]
) -> Int[Array, "B T"]:
    """Replaces the id of padding by that of the document before it.

    Padding before the row's first document gets `before` if that is not 0, else the id of the first
    document.
    """
    real = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1])
    last_real = jax.lax.cummax(jnp.where(real, index, -1), axis=1)
    source = jnp.where(last_real < 0, jnp.argmax(real, axis=1, keepdims=True), last_real)
    spread = jnp.take_along_axis(segment_ids, source, axis=1)
    return jnp.where((last_real < 0) & (before != 0)[:, None], before[:, None], spread)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stretch(compute, scan, q, k, v, g, beta, segments, before, state):
    """Applies an implementation to a stretch, whose incoming state `scan` makes of the others'."""
    given = q, k, v, g, beta, segments, before
    return compute(*given, _incoming(compute, scan, *given, state)[0])


def _stretch_forward(compute, scan, q, k, v, g, beta, segments, before, state):
    def rule(q, k, v, g, beta, state):
        return compute(q, k, v, g, beta, segments, before, state)

    def plain(*given):  # not the custom_vjp function, so that it can be differentiated once more
        *rest, state = given
        return jax.vjp(lambda state: compute(*rest, state), state)[0]

    map_by = plain if compute is _chunked else compute  # kernels would write what it saves
    state, transition = _incoming(map_by, scan, q, k, v, g, beta, segments, before, state)
    results, pullback = jax.vjp(rule, q, k, v, g, beta, state)
    return results, (pullback, transition)


def _stretch_backward(compute, scan, residuals, cotangents):
    pullback, transition = residuals
    d_out, d_final = cotangents
    added = pullback((d_out, d_final))[-1]
    d_final += scan(_compose, (transition.swapaxes(-1, -2), added), reverse=True)[1]
    *d_arrays, d_state = pullback((d_out, d_final))
    return *d_arrays, None, None, d_state


_stretch.defvjp(_stretch_forward, _stretch_backward)


def _incoming(compute, scan, q, k, v, g, beta, segments, before, state):
    """The state that comes into the stretch, and M of the stretch's map S → M S + B.

    `state` is what the row begins with, on its first stretch, and zero on the others.
    """
    H = k.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(H, dtype=jnp.float32), (*state.shape[:-1], H))
    nothing = jnp.zeros((*v.shape[:-1], H), v.dtype)
    _, transition = compute(q, k, nothing, g, beta, segments, before, identity)
    _, added = compute(q, k, v, g, beta, segments, before, state)
    return state + scan(_compose, (transition, added))[1], transition


def _compose(earlier, later):
    """The composition of two maps (M, B)."""
    dot = functools.partial(jnp.einsum, "bnhi,bnip->bnhp", precision=_HIGHEST)
    return dot(later[0], earlier[0]), dot(later[0], earlier[1]) + later[1]


def _recurrent(q, k, v, g, beta, segments, before, state):
    repeats = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(x, repeats, axis=2) for x in (q, k))
    starts = segments != jnp.concatenate([before[:, None], segments[:, :-1]], axis=1)

    def step(state, token):
        q, k, v, g, beta, start = token
        start, decay = start[:, None, None], jnp.exp(g)[..., None]
        # Decayed after the product: XLA:CPU would first write a decayed state, which two operations
        # read, to memory. In decoding that took two thirds of this step.
        recalled = jnp.where(start, 0, decay * jnp.einsum("bnhp,bnh->bnp", state, k))
        kept = jnp.where(start[..., None], 0, decay[..., None] * state)
        state = kept + jnp.einsum("bnh,bn,bnp->bnhp", k, beta, v - recalled)
        return state, jnp.einsum("bnhp,bnh->bnp", state, q)

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, starts)]
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


def _by_hopper(q, k, v, g, beta, segments, before, state):
    B, T, K, H = k.shape
    N, P = v.shape[2:]
    if not delta_hopper.fits(H, P, v.dtype):
        raise ValueError(
            f"implementation='hopper' needs bfloat16 and heads of 128, got {v.dtype}, {H} for keys "
            f"and {P} for values; use 'chunked'"
        )
    q, k, v = (pad_to_multiple(x, CHUNK) for x in (q, k, v))

    split = functools.partial(_split, chunk=CHUNK)
    g, beta = (split(x, K, N // K) for x in (g, beta))
    decay = _decays(g, split(segments, mode="edge"), before)
    keys, queries = (split(x.astype(jnp.float32), K) for x in (k, q))
    inverse = _differentiable_inverse(beta[..., None] * _key_products(keys, decay))

    def by_head(x):  # [Z, B, K, R, C, ...] → [B, N, T, ...]
        x = x.transpose(1, 2, 3, 0, *range(4, x.ndim))
        return x.reshape(B, N, -1, *x.shape[5:])

    solve, scores = inverse * beta[..., None, :], _score(queries, keys, decay)
    start, end, whole = decay[1:]
    out, state = delta_hopper.recurrence(
        q,
        k,
        v,
        *(by_head(x.astype(v.dtype)) for x in (solve, scores)),
        *map(by_head, (start, end, whole[..., None])),
        state,
    )
    return out[:, :T], state


@jax.custom_vjp
def _differentiable_inverse(lower):
    return _unit_lower_inverse(lower)


def _inverse_backward(inverse, d_inverse):
    product = functools.partial(jnp.einsum, precision=_HIGH)
    d_lower = product("...ji,...jk->...ik", inverse, d_inverse)
    return (-_strictly_lower(product("...ik,...jk->...ij", d_lower, inverse)),)


_differentiable_inverse.defvjp(lambda lower: (_unit_lower_inverse(lower),) * 2, _inverse_backward)


def _split(x, *heads, chunk, mode="constant"):
    """[B, T, ...] → [Z, B, heads..., C, ...].

    The padding of zeros to whole chunks neither writes to the state nor decays it.
    """
    x = pad_to_multiple(x, chunk, mode=mode)
    x = x.reshape(len(x), -1, chunk, *heads, *x.shape[2 + (len(heads) > 0) :])
    return x.transpose(1, 0, *range(3, 3 + len(heads)), 2, *range(3 + len(heads), x.ndim))


def _chunked(q, k, v, g, beta, segments, before, state):
    B, T, K, H = k.shape
    N, P = v.shape[2:]
    chunk = min(_chunk_size(H), max(_BLOCK, 1 << (T - 1).bit_length()))
    split, R = functools.partial(_split, chunk=chunk), N // K
    out, state = _chunks(
        split(q, K),
        split(k, K),
        split(v, K, R),
        split(g, K, R),
        split(beta, K, R),
        # `once`, or XLA:CPU would spread ids over padding anew for each pair of a chunk's tokens.
        once(functools.partial(split, mode="edge"), segments),
        before,
        state.reshape(B, K, R, H, P),
    )
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, N, P)
    return out[:, :T], state.reshape(B, N, H, P)


def _chunk_size(key_size):
    """The number of tokens of a chunk: a power of two, at most `CHUNK`.

    Per token, products inside chunks cost C and products with states H · P / C. Matrix units need a
    large C; a CPU is fastest if both costs are about equal.
    """
    if platform() != "cpu":
        return CHUNK
    return min(CHUNK, max(_BLOCK, 1 << (key_size - 1).bit_length()))


# Arrays below are chunked, with axes for the K key heads and the R value heads of each:
# q, k [Z B K C H], v [Z B K R C P], g, beta [Z B K R C], segments [Z B C], states [B K R H P].


@jax.custom_vjp
def _chunks(q, k, v, g, beta, segments, before, state):
    return _chunks_forward(q, k, v, g, beta, segments, before, state)[0]


def _chunks_forward(q, k, v, g, beta, segments, before, state):
    decay = _decays(g, segments, before)
    inverse = _unit_lower_inverse(beta[..., None] * _key_products(k, decay))
    scores = _score(q, k, decay)

    def step(state, chunk):
        q, scores, k, v, beta, inverse, start, end, whole = chunk
        errors = v - start[..., None] * small_products("bkch,bkrhp->bkrcp", k, state)
        scaled = beta[..., None] * errors
        new = small_products("bkrcd,bkrdp->bkrcp", inverse, scaled, precision=_HIGH)
        after = whole[..., None, None] * state
        after += small_products("bkch,bkrcp->bkrhp", k, end[..., None] * new)
        out = start[..., None] * small_products("bkch,bkrhp->bkrcp", q, state)
        out += small_products("bkrcd,bkrdp->bkrcp", scores, new, precision=_HIGH)
        return after, (out, state)

    chunks = (q, scores, k, v, beta, inverse, *decay[1:])
    final, (out, states) = jax.lax.scan(step, state, chunks)
    return (out, final), (q, k, v, g, beta, segments, before, inverse, states)


def _chunks_backward(residuals, cotangents):
    q, k, v, g, beta, segments, before, inverse, states = residuals
    d_out, d_final = cotangents
    decay = gamma, start, end, whole = _decays(g, segments, before)
    products = _key_products(k, decay)
    scores = _score(q, k, decay)
    dot = functools.partial(small_products, precision=_HIGH)

    # Recompute the writes Vn, for all chunks at once, because their incoming states are saved.
    read = small_products("zbkch,zbkrhp->zbkrcp", k, states)
    errors = v - start[..., None] * read
    new = dot("zbkrcd,zbkrdp->zbkrcp", inverse, beta[..., None] * errors)

    # Scan from the last chunk to the first for the gradients of states and writes.
    d_new_inside = dot("zbkrdc,zbkrdp->zbkrcp", scores, d_out)

    def step(d_after, chunk):
        q, k, beta, inverse, d_out, d_new, start, end, whole = chunk
        d_new += end[..., None] * small_products("bkch,bkrhp->bkrcp", k, d_after)
        d_scaled = small_products("bkrdc,bkrdp->bkrcp", inverse, d_new, precision=_HIGH)
        d_state = whole[..., None, None] * d_after
        d_state += small_products("bkch,bkrcp->bkrhp", q, start[..., None] * d_out)
        d_state -= small_products("bkch,bkrcp->bkrhp", k, (beta * start)[..., None] * d_scaled)
        return d_state, (d_scaled, d_after)

    chunks = (q, k, beta, inverse, d_out, d_new_inside, start, end, whole)
    d_state, (d_scaled, d_after) = jax.lax.scan(step, d_final, chunks, reverse=True)

    # The rest is parallel over chunks. `d_products` is the gradient of stril(β ⊙ K Kᵀ ⊙ Γ), through
    # L⁻¹.
    d_products = -_strictly_lower(dot("zbkrcp,zbkrdp->zbkrcd", d_scaled, new))
    d_scores = dot("zbkrcp,zbkrdp->zbkrcd", d_out, new)  # gamma is zero above the diagonal
    d_read = -(beta * start)[..., None] * d_scaled
    d_queried = start[..., None] * d_out
    carried = end[..., None] * small_products("zbkrcp,zbkrhp->zbkrch", new, d_after)

    d_kk = _sum_value_heads(beta[..., None] * gamma * d_products)
    d_qk = _sum_value_heads(gamma * d_scores)
    d_q = dot("zbkcd,zbkdh->zbkch", d_qk, k)
    d_q += _sum_value_heads(small_products("zbkrcp,zbkrhp->zbkrch", d_queried, states))
    d_k = dot("zbkdc,zbkdh->zbkch", d_qk, q)
    d_k += dot("zbkcd,zbkdh->zbkch", d_kk + d_kk.swapaxes(-1, -2), k)
    d_k += _sum_value_heads(carried + small_products("zbkrcp,zbkrhp->zbkrch", d_read, states))
    d_v = beta[..., None] * d_scaled
    d_beta = (d_scaled * errors).sum(-1) + (d_products * products).sum(-1)

    # Gradients of the exponents of Γ_ij, γ_i, d_i and γ_C. The gradient of g_l is the sum over all
    # exponents that span l.
    d_gamma = _strictly_lower(d_products * beta[..., None] * products + d_scores * scores)
    queried = small_products("zbkch,zbkrhp->zbkrcp", q, states)
    d_start = (d_queried * queried + d_read * read).sum(-1)
    d_end = jnp.einsum("zbkrch,zbkch->zbkrc", carried, k)
    d_whole = whole * (d_after * states).sum((-1, -2))
    spans = jnp.einsum("lc,zbkrcd->zbkrld", _ones_upto(g.shape[-1]).T, d_gamma, precision=_HIGHEST)
    d_g = _strictly_lower(spans).sum(-1)
    d_g += jax.lax.cumsum(d_start, axis=4, reverse=True)
    d_g += jnp.pad(jax.lax.cumsum(d_end, axis=4)[..., :-1], [(0, 0)] * 4 + [(1, 0)])
    d_g += d_whole[..., None]
    return d_q, d_k, d_v, d_g, d_beta, None, None, d_state


_chunks.defvjp(_chunks_forward, _chunks_backward)


def _decays(g, segments, before):
    """Γ [Z B K R C C], γ and d [Z B K R C], γ_C [Z B K R], zero across documents."""
    C = g.shape[-1]
    # The exponent of Γ_ij, Σ_{j<l≤i} g_l, is a product of 0/1 masks with g, without cancellation.
    spans = jnp.einsum(
        "il,zbkrlj->zbkrij", _ones_upto(C), _strictly_lower(g[..., None]), precision=_HIGHEST
    )
    same = segments[..., :, None] == segments[..., None, :]
    causal = np.tril(np.ones((C, C), bool))
    gamma = _masked_exp(spans, (causal & same)[:, :, None, None])

    before = jnp.concatenate([before[None], segments[:-1, :, -1]])[..., None]
    last = segments[..., -1:]
    start = _masked_exp(jax.lax.cumsum(g, axis=4), (segments == before)[:, :, None, None])
    # The sums exclude g_i from the start, because subtracting it would leave its rounding error.
    after = jnp.pad(jax.lax.cumsum(g[..., 1:], axis=4, reverse=True), [(0, 0)] * 4 + [(0, 1)])
    end = _masked_exp(after, (segments == last)[:, :, None, None])
    whole = _masked_exp(g.sum(-1), (last == before)[:, :, None])
    return gamma, start, end, whole


def _masked_exp(x, mask):
    return jnp.exp(jnp.where(mask, x, -jnp.inf))


def _key_products(k, decay):
    """Returns stril(K Kᵀ ⊙ Γ)."""
    products = small_products("zbkch,zbkdh->zbkcd", k, k, _HIGH)
    return _strictly_lower(products[:, :, :, None] * decay[0])


def _score(q, k, decay):
    """Returns tril(Q Kᵀ ⊙ Γ)."""
    return small_products("zbkch,zbkdh->zbkcd", q, k, _HIGH)[:, :, :, None] * decay[0]


def _unit_lower_inverse(lower):
    """Inverts I + lower [Z B K R C C], where `lower` is strictly lower triangular."""
    return _inverse_on_cpu(lower) if platform() == "cpu" else _inverse_by_blocks(lower)


def _inverse_by_blocks(lower):
    """Inverts diagonal blocks of up to 16 rows row by row, and merges them by products."""
    C = lower.shape[-1]
    size = min(_BLOCK, C)
    # Row i of the inverse is eᵢ − Σ_{j<i} lower[i, j] · inverse[j]. The blocks of all chunks are
    # along the last axis here.
    blocks = _diagonal_blocks(lower, size)
    across = blocks.reshape(-1, size, size).transpose(1, 2, 0)
    identity = jnp.broadcast_to(jnp.eye(size, dtype=jnp.float32)[..., None], across.shape)
    rows: list[Array] = []  # unrolled, because a GPU would launch several kernels per iteration
    for i in range(size):
        rows.append(identity[i] - sum(across[i, j] * row for j, row in enumerate(rows)))
    inverse = jnp.stack(rows).transpose(2, 0, 1).reshape(blocks.shape)
    # Merge neighbours until one block is left: [[A, 0], [L, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ L A⁻¹, B⁻¹]].
    while size < C:
        above, below = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        off = _diagonal_blocks(lower, 2 * size)[..., size:, :size]
        corner = -jnp.einsum("...ij,...jk,...kl->...il", below, off, above, precision=_HIGH)
        top = jnp.concatenate([above, jnp.zeros_like(above)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, below], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


def _inverse_on_cpu(lower):
    """Merges blocks, from 1 × 1 on, by elementwise products with the heads along the last axis.

    `ops.cpu.small_products` vectorises over a block's columns, too few here to fill a vector.
    """
    Z, B, K, R, C, _ = lower.shape
    lower = jnp.moveaxis(lower.reshape(Z, B, K * R, C, C), 2, -1)

    def dot(x, y):
        return axis_sum(x[..., None, :] * y[..., None, :, :, :], -3)

    inverse, size = jnp.ones((Z, B, C, 1, 1, K * R), jnp.float32), 1
    while size < C:
        above, below = inverse[:, :, 0::2], inverse[:, :, 1::2]
        starts = range(0, C, 2 * size)
        off = jnp.stack([lower[:, :, s + size : s + 2 * size, s : s + size] for s in starts], 2)
        corner = -dot(below, dot(off, above))
        top = jnp.concatenate([above, jnp.zeros_like(above)], axis=-2)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, below], axis=-2)], axis=-3)
        size *= 2
    return jnp.moveaxis(inverse[:, :, 0], -1, 2).reshape(Z, B, K, R, C, C)


def _diagonal_blocks(x, size):
    """[..., C, C] → [..., C / size, size, size]."""
    starts = range(0, x.shape[-1], size)
    return jnp.stack([x[..., s : s + size, s : s + size] for s in starts], axis=-3)


def _sum_value_heads(x):
    """Sums over axis R; unrolled, because XLA:CPU's reductions over few entries are slow."""
    return sum(jnp.unstack(x, axis=3))


def _strictly_lower(x):
    """Keeps the entries i > j of x [..., C, C or 1] and zeroes the others; the result is square."""
    C = x.shape[-2]
    return jnp.where(np.tril(np.ones((C, C), bool), -1), x, 0)


def _ones_upto(size):
    return np.tril(np.ones((size, size), np.float32))
