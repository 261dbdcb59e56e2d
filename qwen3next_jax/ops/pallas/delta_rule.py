"""The chunked gated delta rule as two TPU kernels, forward and backward.

`ops/delta_rule.py` has the equations, the letters and the hazards. Here a program takes a few
chunks of `heads` key heads and of the R value heads of each, one chunk after another. The grid's
last axis is sequential, and the states stay in the chip's vector memory from one program to the
next. The forward kernel saves each chunk's incoming state and L⁻¹; the backward kernel visits the
chunks from last to first and recomputes the rest.

*Precision.* Matrix units multiply bfloat16. If v is bfloat16, so are q, k, L⁻¹, and states when
they are saved or multiplied; gates, exponentials, the inversion, running states and sums are
float32. Products with a state round their other factor as well, and take one pass. Inside a chunk
the gradients of exponents depend on the products, so a float32 factor is split into a high and a
low bfloat16 part: a product takes one pass if both factors are bfloat16, two if one is, three if
none is (`_dot`). With float32 values all products are float32.

*The inverse.* Diagonal blocks D of 16 rows are inverted by substitution on the vector unit, applied
to [I | off-diagonal blocks] at once, which fills the unit's lanes. The remaining equation, L⁻¹ =
D⁻¹ − (D⁻¹ off) L⁻¹, takes three small products. No powers are formed.

*Gates* are passed as rows [.., C] along the lanes, which is dense in memory. A masked sum over
lanes, which is exact, transposes a row to a column.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.pallas import tpu
from qwen3next_jax.ops.pallas.tpu import LANES
from qwen3next_jax.ops.shapes import pad_to_multiple

CHUNK = 64  # tokens of a chunk
_BLOCK = 16  # size of the diagonal blocks of L that are inverted by substitution
_HEADS = 2  # key heads of a program; independent chains of products hide each other's latency
_OUT = -1e30  # masked exponent, whose exp is 0


def delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    g: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    segments: Int[Array, "B T"],
    before: Int[Array, "B"],
    state: Float[Array, "B N H P"],
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Runs the kernels; on a CPU they are interpreted, for tests only.

    Heads are padded with zeros to whole vectors of a TPU, of 128 lanes. The delta rule never writes
    to the padded rows and columns of the state.

    Args:
      q, k, v: queries, keys and values of one dtype, which determines the products' precision.
      g, beta: log decays and write strengths, float32.
      segments: segment id of each token.
      before: segment id of the document that `state` belongs to.
      state: state before the first token, float32.

    Returns:
      Outputs in v's dtype, and the state after the last token in float32.
    """
    T, K = k.shape[1:3]
    key_size, value_size = state.shape[2:]
    q, k, v, state = (pad_to_multiple(x, LANES, axis=-1) for x in (q, k, v, state))
    state = pad_to_multiple(state, LANES, axis=-2)
    B, N, H, P = state.shape
    R = N // K

    def rows(x):  # [B, T, N] → [B, K, Z, R, C]
        return pad_to_multiple(x, CHUNK).reshape(B, -1, CHUNK, K, R).transpose(0, 3, 1, 4, 2)

    gates = jnp.concatenate([rows(g), rows(beta)], axis=3)
    marks = _marks(pad_to_multiple(segments, CHUNK, mode="edge"), before)
    # Heads before tokens: XLA computes q, k and v in this layout and needs no copies.
    q, k, v = (pad_to_multiple(x, CHUNK).swapaxes(1, 2) for x in (q, k, v))
    state = state.reshape(B, K, R, H, P).swapaxes(2, 3).reshape(B, K, H, R * P)
    out, state = _delta_rule(q, k, v, gates, marks, state)
    state = state.reshape(B, K, H, R, P).swapaxes(2, 3).reshape(B, N, H, P)
    out = out.swapaxes(1, 2)[:, :T, :, :value_size]
    return out, state[:, :, :key_size, :value_size]


def _marks(segments, before):
    """Index of each token's document along the row, as float32 [B, Z, 2, C].

    Of the axis of size 2, entry 0 holds the tokens' indices, and entry 1 repeats the index of the
    last token before the chunk; index 0 is the document of the initial state. Small integers are
    exact in float32, the dtype that all vector operations support.
    """
    changes = segments != jnp.concatenate([before[:, None], segments[:, :-1]], axis=1)
    own = jnp.cumsum(changes, axis=1).reshape(len(segments), -1, CHUNK)
    last = jnp.pad(own[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    return jnp.stack([own, jnp.broadcast_to(last, own.shape)], axis=2).astype(jnp.float32)


# Shapes below: q, k [B, K, T, H], v, out [B, N, T, P], gates [B, K, Z, 2·R, C] (g, then β), marks
# [B, Z, 2, C]. The states of a key head's R value heads are concatenated: [B, K, H, R·P], and
# [B, K, Z, H, R·P] for all chunks; so are the inverses [B, K, Z, C, R·C].


@jax.custom_vjp
def _delta_rule(q, k, v, gates, marks, state):
    return _forward(q, k, v, gates, marks, state, save=False)


def _delta_rule_forward(q, k, v, gates, marks, state):
    out, final, states, inverses = _forward(q, k, v, gates, marks, state, save=True)
    return (out, final), (q, k, v, gates, marks, states, inverses)


def _delta_rule_backward(residuals, cotangents):
    return _backward(*residuals, *cotangents)


_delta_rule.defvjp(_delta_rule_forward, _delta_rule_backward)


def _forward(q, k, v, gates, marks, state, *, save):
    sizes = _Sizes(v, gates, state)
    shapes, dtype = jax.ShapeDtypeStruct, v.dtype
    B, K, Z, _, C = gates.shape
    H, RP = state.shape[2:]
    out_shape = [shapes(v.shape, dtype), shapes(state.shape, jnp.float32)]
    names = ["value", "state"]
    if save:
        out_shape += [
            shapes((B, K, Z, H, RP), dtype),
            shapes((B, K, Z, C, sizes.R * C), dtype),
        ]
        names += ["states", "inverses"]
    given = q, k, v, gates, marks, state
    return tpu.pallas_call(
        functools.partial(_forward_kernel, save=save),
        grid=sizes.grid,
        in_specs=[sizes.spec(n) for n in ("key", "key", "value", "gates", "marks", "state")],
        out_specs=[sizes.spec(n) for n in names],
        out_shape=out_shape,
        cost_estimate=sizes.cost(forward=True, arrays=(*given, *out_shape)),
        name="gated_delta_rule_forward",
        semantics=("parallel", "parallel", "arbitrary"),
    )(*given)


def _backward(q, k, v, gates, marks, states, inverses, d_out, d_final):
    sizes = _Sizes(v, gates, d_final)
    spec = functools.partial(sizes.spec, reverse=True)
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, gates, d_final)]
    given = q, k, v, gates, marks, states, inverses, d_out, d_final
    names = "key", "key", "value", "gates", "marks", "states", "inverses", "value", "state"
    d_q, d_k, d_v, d_gates, d_state = tpu.pallas_call(
        _backward_kernel,
        grid=sizes.grid,
        in_specs=[spec(n) for n in names],
        out_specs=[spec(n) for n in ("key", "key", "value", "gates", "state")],
        out_shape=out_shape,
        cost_estimate=sizes.cost(forward=False, arrays=(*given, *out_shape)),
        name="gated_delta_rule_backward",
        semantics=("parallel", "parallel", "arbitrary"),
    )(*given)
    return d_q, d_k, d_v, d_gates, None, d_state


class _Sizes:
    """How the work is divided: a program takes the next `chunks` chunks of `heads` key heads."""

    def __init__(self, v, gates, state):
        self.B, self.K, self.Z, rows, self.C = gates.shape
        self.R = rows // 2
        self.H, self.RP = state.shape[2:]
        self.dtype = v.dtype
        self.heads = math.gcd(self.K, _HEADS)
        self.chunks = math.gcd(self.Z, 8 if self.dtype == jnp.bfloat16 else 4)
        self.grid = (self.B, self.K // self.heads, self.Z // self.chunks)

    def spec(self, name, *, reverse=False):
        """The blocks of an array; with `reverse`, visited from the last to the first along T."""
        C, R, H, RP, heads, chunks = self.C, self.R, self.H, self.RP, self.heads, self.chunks

        def order(z):
            return self.grid[2] - 1 - z if reverse else z

        if name in ("key", "value"):
            rows = (heads, chunks * C, H) if name == "key" else (heads * R, chunks * C, RP // R)
            return pl.BlockSpec((1, *rows), lambda b, k, z: (b, k, order(z), 0))
        if name == "marks":
            return pl.BlockSpec((1, chunks, 2, C), lambda b, k, z: (b, order(z), 0, 0))
        if name == "state":
            return pl.BlockSpec((1, heads, H, RP), lambda b, k, z: (b, k, 0, 0))
        last = {"gates": (2 * R, C), "states": (H, RP), "inverses": (C, R * C)}[name]
        return pl.BlockSpec((1, heads, chunks, *last), lambda b, k, z: (b, k, order(z), 0, 0))

    def cost(self, *, forward, arrays):
        """The cost of all programs: products times passes, exponentials and memory traffic."""
        C, R, H, P = self.C, self.R, self.H, self.RP // self.R
        # Passes of products with 0, 1 and 2 float32 factors; with float32 values always 6.
        one, two, three = (1, 2, 3) if self.dtype == jnp.bfloat16 else (6, 6, 6)
        key_products = one * 2 * C * C * H
        inverse = three * _BLOCK * C * sum(range(_BLOCK, C, _BLOCK))
        if forward:
            products = key_products + R * (
                inverse + one * 3 * C * H * P + (two + three) * C * C * P
            )
        else:
            products = (
                key_products
                + two * 3 * C * C * H
                + R * (one * 8 * C * H * P + (two + two + two + two + three) * C * C * P)
            )
        chunks = self.B * self.K * self.Z
        return pl.CostEstimate(
            flops=2 * products * chunks,
            transcendentals=(C * C + 2 * C + 1) * R * chunks,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        )


def _forward_kernel(
    q_ref, k_ref, v_ref, gates_ref, marks_ref, initial_ref, out_ref, state_ref, *saved, save
):
    # The output block of the state holds the running state; its index does not change over chunks.
    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    heads, chunks, rows, C = gates_ref.shape[1:]
    R, dtype = rows // 2, v_ref.dtype
    dot, rough_dot = (functools.partial(f, dtype=dtype) for f in (_dot, _rough_dot))

    def visit(z, carry):
        for head in range(heads):
            tokens = pl.ds(z * C, C)
            q, k = q_ref[0, head, tokens], k_ref[0, head, tokens]
            gates, marks = gates_ref[0, head, z], marks_ref[0, z]
            state = state_ref[0, head]
            decays = [_decays(gates[r : r + 1], marks) for r in range(R)]
            betas = [tpu.column(gates[R + r : R + r + 1]) for r in range(R)]
            qk = dot(jnp.concatenate([k, q]), k, contract=(1, 1))
            inverses = _unit_lower_inverses(
                [_strictly_lower(b * qk[:C] * d[0]) for b, d in zip(betas, decays, strict=True)],
                dot,
            )
            inverses = [x.astype(dtype) for x in inverses]
            if save:
                states_ref, inverses_ref = saved
                states_ref[0, head, z] = state.astype(dtype)
                inverses_ref[0, head, z] = jnp.concatenate(inverses, axis=1)
            read = rough_dot(jnp.concatenate([k, q]), state)  # K S over Q S
            news, wholes = [], []
            for r in range(R):
                gamma, start, end, whole = decays[r]
                v = v_ref[0, head * R + r, tokens].astype(jnp.float32)
                errors = v - start * _slice(read[:C], r, R)
                new = dot(inverses[r], betas[r] * errors)
                out = start * _slice(read[C:], r, R) + dot(qk[C:] * gamma, new)
                out_ref[0, head * R + r, tokens] = out.astype(dtype)
                news.append(end * new)
                wholes.append(jnp.broadcast_to(whole, (1, new.shape[1])))
            state = jnp.concatenate(wholes, axis=1) * state
            state_ref[0, head] = state + rough_dot(k, jnp.concatenate(news, 1), contract=(0, 0))
        return carry

    jax.lax.fori_loop(0, chunks, visit, 0)


def _backward_kernel(
    q_ref,
    k_ref,
    v_ref,
    gates_ref,
    marks_ref,
    states_ref,
    inverses_ref,
    d_out_ref,
    d_final_ref,
    d_q_ref,
    d_k_ref,
    d_v_ref,
    d_gates_ref,
    d_state_ref,
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state_ref[...] = d_final_ref[...]

    heads, chunks, rows, C = gates_ref.shape[1:]
    R, dtype = rows // 2, v_ref.dtype
    dot, rough_dot = (functools.partial(f, dtype=dtype) for f in (_dot, _rough_dot))

    def visit(step, carry):
        z = chunks - 1 - step
        for head in range(heads):
            tokens = pl.ds(z * C, C)
            q, k = q_ref[0, head, tokens], k_ref[0, head, tokens]
            gates, marks = gates_ref[0, head, z], marks_ref[0, z]
            state, d_after = states_ref[0, head, z], d_state_ref[0, head]
            saved = inverses_ref[0, head, z]
            kq = jnp.concatenate([k, q])
            key_products = dot(kq, k, contract=(1, 1))
            read = rough_dot(kq, state)
            written = rough_dot(k, d_after)  # K dS'
            d_reads, d_queries, news, wholes = [], [], [], []
            d_kk = jnp.zeros((C, C), jnp.float32)
            d_qk = jnp.zeros((C, C), jnp.float32)
            d_gs, d_betas = [], []
            for r in range(R):
                gamma, start, end, whole = _decays(gates[r : r + 1], marks)
                beta = tpu.column(gates[R + r : R + r + 1])
                inverse, value = _slice(saved, r, R), (0, head * R + r, tokens)
                v, d_out = v_ref[value].astype(jnp.float32), d_out_ref[value]
                products = _strictly_lower(key_products[:C] * gamma)
                scores = key_products[C:] * gamma
                errors = v - start * _slice(read[:C], r, R)
                new = dot(inverse, beta * errors)
                d_new = dot(scores, d_out, contract=(0, 0)) + end * _slice(written, r, R)
                d_scaled = dot(inverse, d_new, contract=(0, 0))
                d_products = -_strictly_lower(dot(d_scaled, new, contract=(1, 1)))
                d_scores = dot(d_out, new, contract=(1, 1))
                d_read = -(beta * start) * d_scaled
                d_queried = start * d_out.astype(jnp.float32)
                d_kk += beta * gamma * d_products
                d_qk += gamma * d_scores
                d_v_ref[value] = (beta * d_scaled).astype(dtype)
                d_beta = _sum(d_scaled * errors) + _sum(d_products * products)
                # Gradients of the exponents; `_span_gradients` sums them to the gradient of g.
                d_gamma = _strictly_lower(d_products * beta * products + d_scores * scores)
                d_start = _sum(d_queried * _slice(read[C:], r, R))
                d_start += _sum(d_read * _slice(read[:C], r, R))
                d_end = end * _sum(new * _slice(written, r, R))
                overlap = _slice(d_after, r, R) * _slice(state, r, R).astype(jnp.float32)
                d_whole = whole * _sum(overlap.sum(0, keepdims=True))
                d_gs.append(tpu.row(_span_gradients(d_gamma, d_start, d_end, d_whole)))
                d_betas.append(tpu.row(d_beta))
                d_reads.append(d_read)
                d_queries.append(d_queried)
                news.append(end * new)
                wholes.append(jnp.broadcast_to(whole, (1, new.shape[1])))
            d_read, d_queried, new, whole = (
                jnp.concatenate(x, axis=1) for x in (d_reads, d_queries, news, wholes)
            )
            d_gates_ref[0, head, z] = jnp.concatenate(d_gs + d_betas)
            d_kq = jnp.concatenate([d_read, d_queried])
            d_state_ref[0, head] = whole * d_after + rough_dot(kq, d_kq, contract=(0, 0))
            through = rough_dot(d_kq, state, contract=(1, 1))
            d_q_ref[0, head, tokens] = (through[C:] + dot(d_qk, k)).astype(dtype)
            d_k = through[:C] + rough_dot(new, d_after, contract=(1, 1))
            d_k += dot(d_qk, q, contract=(0, 0)) + dot(d_kk + d_kk.T, k)
            d_k_ref[0, head, tokens] = d_k.astype(dtype)
        return carry

    jax.lax.fori_loop(0, chunks, visit, 0)


def _slice(x, r, R):
    """The columns of value head r of R concatenated heads."""
    width = x.shape[1] // R
    return x[:, r * width : (r + 1) * width]


def _decays(g, marks):
    """Γ [C, C], γ and d [C, 1], γ_C [1, 1] of a row g [1, C], zero across documents."""
    C = g.shape[1]
    own, last = marks[0:1], marks[0:1, C - 1 : C]
    document, before = tpu.column(own), marks[1:2, 0:1]
    i, j = _indices(C)
    # spans[i, j] = Σ_{j<l≤i} g_l, a cumulative sum down the rows.
    spans = _running_sum(jnp.where(i > j, tpu.column(g), 0))
    gamma = jnp.where((i >= j) & (document == own), spans, _OUT)
    start = jnp.where(document == before, spans[:, 0:1] + g[:, 0:1], _OUT)
    end = jnp.where(document == last, tpu.column(spans[C - 1 : C]), _OUT)
    whole = jnp.where(before == last, spans[C - 1 : C, 0:1] + g[:, 0:1], _OUT)
    return tuple(jnp.exp(x) for x in (gamma, start, end, whole))


def _span_gradients(d_gamma, d_start, d_end, d_whole):
    """The gradient of g [C, 1] from those of the exponents of Γ, γ, d and γ_C."""
    C = d_gamma.shape[0]
    i, j = _indices(C)
    # The exponents of d are the last row of spans; those of γ_i and γ_C are its first column + g_0.
    spans = d_gamma + jnp.where(i == C - 1, tpu.row(d_end), 0)
    spans += jnp.where(j == 0, d_start + jnp.where(i[:, 0:1] == C - 1, d_whole, 0), 0)
    spanned = _running_sum(jnp.where(i > j, spans, 0), reverse=True)
    d_g = _sum(jnp.where(i > j, spanned, 0))
    first = d_start.sum(0, keepdims=True) + d_whole
    return d_g + jnp.where(i[:, 0:1] == 0, first, 0)


def _running_sum(x, *, reverse=False):
    """Sums down the rows (`reverse`: up), by doubling strides."""
    C = x.shape[0]
    i, _ = _indices(*x.shape)
    stride = 1
    while stride < C:
        if reverse:
            x += jnp.where(i < C - stride, pltpu.roll(x, C - stride, 0), 0)
        else:
            x += jnp.where(i >= stride, pltpu.roll(x, stride, 0), 0)
        stride *= 2
    return x


def _unit_lower_inverses(lowers, dot):
    """Inverts I + lower for strictly lower triangular matrices [C, C]."""
    n, C = len(lowers), lowers[0].shape[0]
    i, j = _indices(C)
    identity = jnp.where(i == j, 1.0, 0.0)
    off_diagonal = i // _BLOCK != j // _BLOCK
    # [D⁻¹ | D⁻¹ off] by forward substitution: step s subtracts row s of each block, which is final
    # then, from the rows below it.
    both = jnp.concatenate(
        [jnp.concatenate([identity, jnp.where(off_diagonal, x, 0)], axis=1) for x in lowers]
    ).reshape(-1, _BLOCK, 2 * C)
    starts = range(0, C, _BLOCK)
    blocks = jnp.concatenate(
        [x[s : s + _BLOCK, s : s + _BLOCK] for x in lowers for s in starts]
    ).reshape(-1, _BLOCK, _BLOCK)
    for s in range(_BLOCK - 1):
        both -= blocks[:, :, s : s + 1] * both[:, s : s + 1, :]
    # Block rows from top to bottom, as L⁻¹ = D⁻¹ − (D⁻¹ off) L⁻¹ needs the rows above on its right.
    inverses = []
    for x in both.reshape(n, C, 2 * C):
        rows = x[:_BLOCK, :C]
        for s in starts[1:]:
            own = slice(s, s + _BLOCK)
            added = x[own, :C] - dot(x[own, C : C + s], rows)
            rows = jnp.concatenate([rows, added])
        inverses.append(rows)
    return inverses


def _dot(x, y, *, dtype, contract=(1, 0)):
    """Sums x · y over the given axes to nearly float32 precision, by bfloat16 products.

    Float32 factors are split into a high and a low bfloat16 part; see the module's docstring.
    """
    if dtype != jnp.bfloat16:
        return _rough_dot(x, y, dtype=dtype, contract=contract)
    total = None
    for m, part in enumerate(_parts(x)):
        for other in _parts(y)[: 2 - m]:  # without the product of both low parts
            product = _rough_dot(part, other, dtype=dtype, contract=contract)
            total = product if total is None else total + product
    return total


def _parts(x):
    """A high and a low bfloat16 part, whose sum is x but for 2⁻¹⁷ of it."""
    if x.dtype == jnp.bfloat16:
        return [x]
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def _rough_dot(x, y, *, dtype, contract=(1, 0)):
    """Sums x · y, both rounded to the dtype, in float32."""
    return tpu.dot(x.astype(dtype), y.astype(dtype), contract=contract)


def _strictly_lower(x):
    i, j = _indices(x.shape[0])
    return jnp.where(i > j, x, 0)


def _sum(x):
    """Sums over lanes, [C, X] → [C, 1]."""
    return x.sum(1, keepdims=True)


def _indices(rows, columns=None):
    shape = (rows, columns or rows)
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
