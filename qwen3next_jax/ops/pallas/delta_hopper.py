"""The gated delta rule's recurrence over chunks, as kernels for NVIDIA's Hopper GPUs.

`ops/delta_rule.py` has the equations and the letters. The values inside a chunk, A = L⁻¹ diag(β)
and the scores M = tril(Q Kᵀ ⊙ Γ), are computed beforehand for all chunks at once. These kernels
compute the recurrence from chunk to chunk, forward

    E = V − γ ⊙ K S      Vn = A E      O = γ ⊙ Q S + M Vn      S' = γ_C S + Kᵀ (d ⊙ Vn)

and its gradients, from the last chunk to the first

    dVn = Mᵀ dO + d ⊙ K dS'      dE = Aᵀ dVn      dV = dE      dM = dO Vnᵀ      dA = dVn Eᵀ
    dQ = (γ ⊙ dO) Sᵀ             dK = (d ⊙ Vn) dS'ᵀ − (γ ⊙ dE) Sᵀ
    dS = γ_C dS' + Qᵀ (γ ⊙ dO) − Kᵀ (γ ⊙ dE)

Two kernels, forward and backward, loop over chunks. One of their programs handles one value head
and half of its value columns, whose states are independent of the other half's; the running state
stays in registers. Only S, dS', dVn and dE depend on the neighbouring chunk; a third kernel
computes the other gradients, with one program per chunk. Factors of products are bfloat16; sums,
gates and running states are float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32

from qwen3next_jax.ops.pallas.delta_rule import CHUNK as C
from qwen3next_jax.ops.pallas.grouped_hopper import transposed

_COLUMNS = 64  # value columns of a program that loops over chunks


def fits(key_size: int, value_size: int, dtype: jnp.dtype) -> bool:
    """Whether these kernels support heads of these sizes and this dtype."""
    return key_size == value_size == 128 and dtype == jnp.bfloat16


@jax.custom_vjp
def recurrence(
    q: BFloat16[Array, "B T K H"],
    k: BFloat16[Array, "B T K H"],
    v: BFloat16[Array, "B T N P"],
    solve: BFloat16[Array, "B N T C"],
    scores: BFloat16[Array, "B N T C"],
    start: Float32[Array, "B N T"],
    end: Float32[Array, "B N T"],
    whole: Float32[Array, "B N Z"],
    state: Float32[Array, "B N H P"],
) -> tuple[BFloat16[Array, "B T N P"], Float32[Array, "B N H P"]]:
    """Computes the recurrence over the chunks of each row.

    Args:
      q, k, v: queries, keys and values. T is a multiple of `CHUNK`, H and P are 128; key head i
        serves the N / K value heads from i · N / K on.
      solve: rows of A of all chunks.
      scores: rows of M of all chunks.
      start, end, whole: decays γ, d and γ_C.
      state: state before the first chunk.

    Returns:
      The outputs O, and the state after the last chunk.
    """
    return tuple(_forward(q, k, v, solve, scores, start, end, whole, state)[:2])


def _recurrence_forward(*given):
    out, final, states = _forward(*given)
    return (out, final), (*given[:-1], states)


def _recurrence_backward(residuals, cotangents):
    return _backward(*residuals, *cotangents)


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _forward(q, k, v, solve, scores, start, end, whole, state):
    B, T, N, P = v.shape
    H = q.shape[-1]
    out_type = [
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct(state.shape, jnp.float32),
        jax.ShapeDtypeStruct((B, N, T // C * H, P), v.dtype),
    ]
    given = q, k, v, solve, scores, start, end, whole, state
    return _run(_forward_kernel, out_type, (B, N, P // _COLUMNS), given)


def _backward(q, k, v, solve, scores, start, end, whole, states, d_out, d_final):
    B, T, N, P = v.shape
    H = q.shape[-1]
    shape, Z = jax.ShapeDtypeStruct, T // C
    gates, values = shape(start.shape, jnp.float32), shape(v.shape, v.dtype)
    d_states, d_new, d_v, d_state = _run(
        _backward_states_kernel,
        [shape(states.shape, states.dtype), values, values, shape(d_final.shape, jnp.float32)],
        (B, N, P // _COLUMNS),
        (q, k, solve, scores, start, end, whole, d_out, d_final),
    )
    keys = shape((B, T, N, H), q.dtype)
    d_q, d_k, d_solve, d_scores, d_start, d_end, d_whole = _run(
        _backward_chunk_kernel,
        [
            keys,
            keys,
            shape(solve.shape, solve.dtype),
            shape(scores.shape, scores.dtype),
            gates,
            gates,
            shape((B, N, Z * H), jnp.float32),
        ],
        (B, N, Z),
        (q, k, v, solve, start, end, states, d_states, d_out, d_new, d_v),
    )

    def sum_heads(x):  # [B, T, N, H] → [B, T, K, H]
        x = x.reshape(B, T, q.shape[2], -1, H)
        return x.astype(jnp.float32).sum(3).astype(q.dtype)

    d_whole = d_whole.reshape(B, N, Z, H).sum(3)
    d_q, d_k = sum_heads(d_q), sum_heads(d_k)
    return d_q, d_k, d_v, d_solve, d_scores, d_start, d_end, d_whole, d_state


def _run(kernel, out_type, grid, given):
    from jax.experimental.pallas import mosaic_gpu as gpu

    return gpu.kernel(
        kernel,
        out_type=out_type,
        grid=grid,
        grid_names=("batch", "head", "part"),
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )(*given)


class _Program:
    """A program's indices and the helpers that all three kernels share."""

    def __init__(self, k, v):
        from jax.experimental.pallas import mosaic_gpu as gpu

        self.gpu = gpu
        self.batch, self.head, self.part = map(jax.lax.axis_index, ("batch", "head", "part"))
        self.key_head = jax.lax.div(self.head, v.shape[2] // k.shape[2])
        self.columns = pl.ds(self.part * _COLUMNS, _COLUMNS)
        self.H, self.chunks, self.dtype = k.shape[3], k.shape[1] // C, v.dtype

    def scratch(self, rows, columns):
        """Shared memory in a layout that matrix products can read."""
        return self.gpu.SMEM((rows, columns), self.dtype, transforms=self._tiles())

    def _tiles(self):
        return self.gpu.TilingTransform((8, 64)), self.gpu.SwizzleTransform(128)

    def blocks(self, order, *shapes):
        """Blocks of arrays whose first axis runs over chunks; `order` maps steps to chunks."""

        def spec(shape):
            rest = (0,) * (len(shape) - 1)
            tiles = self._tiles() if rest else ()
            return self.gpu.BlockSpec(shape, lambda z: (order(z), *rest), transforms=tiles)

        return [spec(shape) for shape in shapes]

    def of_keys(self, x):
        return x.at[self.batch, :, self.key_head]

    def of_values(self, x):
        return x.at[self.batch, :, self.head, self.columns]

    def of_head(self, x):
        return x.at[self.batch, self.head]

    def of_states(self, x):
        return x.at[self.batch, self.head, :, self.columns]

    def product(self, x, y):
        def run(total):
            self.gpu.wgmma(total, x, y)
            return total[...]

        made = pl.run_scoped(run, self.gpu.ACC((x.shape[0], y.shape[1]), jnp.float32))
        self.gpu.commit_smem()  # waits for all warps, so that the factors may be overwritten
        return made

    def scale(self, gates, x):
        return jax.lax.broadcast_in_dim(gates[...], x.shape, [0]) * x

    def set(self, *pairs):
        """Writes values to shared memory and makes them visible to products and copies."""
        for ref, x in pairs:
            ref[...] = x.astype(ref.dtype)
        self.gpu.commit_smem()

    def store(self, *pairs):
        """Starts copies from shared memory."""
        for ref, target in pairs:
            self.gpu.copy_smem_to_gmem(ref, target, commit_group=False)
        self.gpu.commit_smem_to_gmem_group()

    def stored(self):
        """Waits until the sources of started copies may be overwritten."""
        self.gpu.wait_smem_to_gmem(0, wait_read_only=True)

    def initial(self, x):
        def through(staged, barrier):
            self.gpu.copy_gmem_to_smem(self.of_states(x), staged, barrier)
            self.gpu.barrier_wait(barrier)
            return staged[...]

        state = self.gpu.SMEM((self.H, _COLUMNS), jnp.float32)
        return self.gpu.layout_cast(
            pl.run_scoped(through, state, self.gpu.Barrier()), self.gpu.Layout.WGMMA
        )

    def finish(self, state, target):
        def through(staged):
            self.set((staged, state))
            self.store((staged, self.of_states(target)))
            self.gpu.wait_smem_to_gmem(0)

        pl.run_scoped(through, self.gpu.SMEM((self.H, _COLUMNS), jnp.float32))


def _forward_kernel(q, k, v, solve, scores, start, end, whole, initial, out, final, states):
    p = _Program(k, v)

    def with_scratch(held, errors, news, outs):
        def visit(index, q, k, v, solve, scores, start, end, state):
            (z,) = index
            p.stored()
            p.set((held, state))
            read = p.product(k, held)
            p.set((errors, v[...].astype(jnp.float32) - p.scale(start, read)))
            new = p.product(solve, errors)
            p.set((news, new), (errors, p.scale(end, new)))
            queried = p.scale(start, p.product(q, held))
            p.set((outs, queried + p.product(scores, news)))
            p.store(
                (outs, p.of_values(out).at[pl.ds(z * C, C)]),
                (held, p.of_states(states).at[pl.ds(z * p.H, p.H)]),
            )
            return whole[p.batch, p.head, z] * state + p.product(transposed(k), errors)

        state = p.gpu.emit_pipeline(
            visit,
            grid=(p.chunks,),
            in_specs=p.blocks(
                lambda z: z,
                (C, p.H),
                (C, p.H),
                (C, _COLUMNS),
                (C, C),
                (C, C),
                (C,),
                (C,),
            ),
            init_carry=p.initial(initial),
        )(
            p.of_keys(q),
            p.of_keys(k),
            p.of_values(v),
            *map(p.of_head, (solve, scores, start, end)),
        )
        p.stored()
        p.finish(state, final)

    half = p.scratch(C, _COLUMNS)
    pl.run_scoped(with_scratch, p.scratch(p.H, _COLUMNS), half, half, half)


def _backward_states_kernel(
    q, k, solve, scores, start, end, whole, d_out, d_final, d_states, d_new, d_error, d_initial
):
    """Computes the gradients of states, of writes Vn and of E, from the last chunk to the first."""
    p = _Program(k, d_out)

    def order(z):
        return p.chunks - 1 - z

    def with_scratch(held, x, d_news, d_errors):
        def visit(index, q, k, solve, scores, start, end, d_out, d_state):
            z = order(index[0])
            p.stored()
            p.set((held, d_state), (x, p.scale(start, d_out[...].astype(jnp.float32))))
            written = p.scale(end, p.product(k, held))
            p.set((d_news, p.product(transposed(scores), d_out) + written))
            read_back = p.product(transposed(q), x)
            error = p.product(transposed(solve), d_news)
            p.set((d_errors, error), (x, p.scale(start, error)))
            tokens = pl.ds(z * C, C)
            p.store(
                (held, p.of_states(d_states).at[pl.ds(z * p.H, p.H)]),
                (d_news, p.of_values(d_new).at[tokens]),
                (d_errors, p.of_values(d_error).at[tokens]),
            )
            d_state = whole[p.batch, p.head, z] * d_state + read_back
            return d_state - p.product(transposed(k), x)

        d_state = p.gpu.emit_pipeline(
            visit,
            grid=(p.chunks,),
            in_specs=p.blocks(order, (C, p.H), (C, p.H), (C, C), (C, C), (C,), (C,), (C, _COLUMNS)),
            init_carry=p.initial(d_final),
        )(
            p.of_keys(q),
            p.of_keys(k),
            *map(p.of_head, (solve, scores, start, end)),
            p.of_values(d_out),
        )
        p.stored()
        p.finish(d_state, d_initial)

    half = p.scratch(C, _COLUMNS)
    pl.run_scoped(with_scratch, p.scratch(p.H, _COLUMNS), half, half, half)


def _backward_chunk_kernel(
    q,
    k,
    v,
    solve,
    start,
    end,
    states,
    d_states,
    d_out,
    d_new,
    d_error,
    d_q,
    d_k,
    d_solve,
    d_scores,
    d_start,
    d_end,
    d_whole,
):
    """Computes one chunk's other gradients; results overwrite their inputs in shared memory."""
    p = _Program(k, v)
    z, P = p.part, v.shape[3]
    tokens, of_states = pl.ds(z * C, C), pl.ds(z * p.H, p.H)

    def with_scratch(news, scaled, solves, scored, start_sums, end_sums, state_sums):
        def visit(_, q, k, v, solve, start, end, states, d_states, d_out, d_new, d_error):
            read = p.product(k, states)
            p.set((v, v[...].astype(jnp.float32) - p.scale(start, read)))
            errors = v
            new = p.product(solve, errors)
            p.set((news, new), (scaled, p.scale(end, new)))
            p.set((end_sums, (new * p.product(k, d_states)).sum(1)))
            outward, inward = (x[...].astype(jnp.float32) for x in (d_out, d_error))
            p.set((start_sums, (outward * p.product(q, states) - inward * read).sum(1)))
            p.set(
                (scored, p.product(d_out, transposed(news))),
                (solves, p.product(d_new, transposed(errors))),
            )
            p.set((d_out, p.scale(start, outward)), (d_error, p.scale(start, inward)))
            p.set((q, p.product(d_out, transposed(states))))
            kept = p.product(scaled, transposed(d_states))
            p.set((k, kept - p.product(d_error, transposed(states))))
            total = None
            for column in range(0, P, _COLUMNS):
                part = slice(column, column + _COLUMNS)
                state, d_state = (x[:, part].astype(jnp.float32) for x in (states, d_states))
                row_sums = (state * d_state).sum(1)
                total = row_sums if total is None else total + row_sums
            p.set((state_sums, total))
            p.store(
                (q, d_q.at[p.batch, tokens, p.head]),
                (k, d_k.at[p.batch, tokens, p.head]),
                (solves, p.of_head(d_solve).at[tokens]),
                (scored, p.of_head(d_scores).at[tokens]),
                (start_sums, p.of_head(d_start).at[tokens]),
                (end_sums, p.of_head(d_end).at[tokens]),
                (state_sums, p.of_head(d_whole).at[of_states]),
            )
            p.stored()

        def rows_of(x):
            return x.at[p.batch, tokens, p.head]

        p.gpu.emit_pipeline(
            visit,
            grid=(1,),
            in_specs=p.blocks(
                lambda _: 0,
                (C, p.H),
                (C, p.H),
                (C, P),
                (C, C),
                (C,),
                (C,),
                (p.H, P),
                (p.H, P),
                (C, P),
                (C, P),
                (C, P),
            ),
        )(
            *(x.at[p.batch, tokens, p.key_head] for x in (q, k)),
            rows_of(v),
            *(p.of_head(x).at[tokens] for x in (solve, start, end)),
            *(p.of_head(x).at[of_states] for x in (states, d_states)),
            *map(rows_of, (d_out, d_new, d_error)),
        )

    whole_row, square, gates = p.scratch(C, P), p.scratch(C, C), p.gpu.SMEM((C,), jnp.float32)
    pl.run_scoped(
        with_scratch,
        whole_row,
        whole_row,
        square,
        square,
        gates,
        gates,
        p.gpu.SMEM((p.H,), jnp.float32),
    )
