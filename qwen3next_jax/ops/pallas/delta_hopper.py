"""The states of the gated delta rule, chunk by chunk, as two kernels for NVIDIA's Hopper GPUs.

`ops/delta_rule.py` has the equations and the letters. What happens inside a chunk is computed for
all chunks at once before: A = L⁻¹ diag(β) and the scores M = tril(Q Kᵀ ⊙ Γ). Left is what goes from
chunk to chunk, forward

    E = V − γ ⊙ K S      Vn = A E      O = γ ⊙ Q S + M Vn      S' = γ_C S + Kᵀ (d ⊙ Vn)

and its gradients, from the last chunk to the first

    dVn = Mᵀ dO + d ⊙ K dS'      dE = Aᵀ dVn      dV = dE      dM = dO Vnᵀ      dA = dVn Eᵀ
    dQ = (γ ⊙ dO) Sᵀ             dK = (d ⊙ Vn) dS'ᵀ − (γ ⊙ dE) Sᵀ
    dS = γ_C dS' + Qᵀ (γ ⊙ dO) − Kᵀ (γ ⊙ dE)

A program walks over the chunks of one value head for half of the values, whose states do not meet
the other half's; the running state stays in registers. Factors of products are bfloat16, sums,
gates and running states float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float32

from qwen3next_jax.ops.pallas.delta_rule import CHUNK as C
from qwen3next_jax.ops.pallas.grouped_hopper import is_hopper, transposed

_COLUMNS = 64  # values of a program


def can_compile(key_size: int, value_size: int, dtype: jnp.dtype) -> bool:
    """Whether operations are traced for such a GPU, and heads are of these kernels' size."""
    return is_hopper() and key_size == value_size == 128 and dtype == jnp.bfloat16


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
    """Goes through the chunks of each row.

    Args:
      q, k, v: T is a multiple of `CHUNK`, H and P are 128.
      solve: A of each chunk, row by row.
      scores: M, likewise.
      start, end, whole: γ, d and γ_C.
      state: before the first chunk.

    Returns:
      O, and the state behind the last chunk.
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
    H, parts = q.shape[-1], P // _COLUMNS

    def parted(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((parts, *shape), dtype)

    out_type = [
        parted(B, T, N, H, dtype=q.dtype),
        parted(B, T, N, H, dtype=q.dtype),
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        parted(*solve.shape),
        parted(*scores.shape),
        parted(*start.shape),
        parted(*end.shape),
        parted(B, N, T // C * H),
        jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
    ]
    given = q, k, v, solve, scores, start, end, whole, states, d_out, d_final
    d_q, d_k, d_v, *rest, d_whole, d_state = _run(_backward_kernel, out_type, (B, N, parts), given)

    def sum_heads(x):  # [parts, B, T, N, H] → [B, T, K, H]
        x = x.reshape(parts, B, T, q.shape[2], -1, H)
        return x.astype(jnp.float32).sum((0, 4)).astype(q.dtype)

    d_solve, d_scores, d_start, d_end = (x.sum(0) for x in rest)
    d_whole = d_whole.reshape(parts, B, N, -1, H).sum((0, 4))
    return (
        sum_heads(d_q), sum_heads(d_k), d_v, d_solve.astype(solve.dtype),
        d_scores.astype(scores.dtype), d_start, d_end, d_whole, d_state,
    )  # fmt: skip


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
    """What the programs of both kernels have in common."""

    def __init__(self, k, v):
        from jax.experimental.pallas import mosaic_gpu as gpu

        self.gpu = gpu
        self.batch, self.head, self.part = map(jax.lax.axis_index, ("batch", "head", "part"))
        self.key_head = jax.lax.div(self.head, v.shape[2] // k.shape[2])
        self.columns = pl.ds(self.part * _COLUMNS, _COLUMNS)
        self.H, self.chunks, self.dtype = k.shape[3], k.shape[1] // C, v.dtype

    def scratch(self, rows, columns, dtype=None):
        """Shared memory that products can read."""
        dtype = self.dtype if dtype is None else dtype
        return self.gpu.SMEM((rows, columns), dtype, transforms=self._tiles(dtype))

    def _tiles(self, dtype):
        tile = 128 // jnp.dtype(dtype).itemsize
        return self.gpu.TilingTransform((8, tile)), self.gpu.SwizzleTransform(128)

    def blocks(self, order, *shapes):
        """Of arrays that have a chunk's part behind another's."""
        return [
            self.gpu.BlockSpec(
                shape, lambda z, n=len(shape): (order(z),) + (0,) * (n - 1),
                transforms=self._tiles(self.dtype) if len(shape) > 1 else (),
            )
            for shape in shapes
        ]  # fmt: skip

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

        return pl.run_scoped(run, self.gpu.ACC((x.shape[0], y.shape[1]), jnp.float32))

    def scale(self, gates, x):
        return jax.lax.broadcast_in_dim(gates[...], x.shape, [0]) * x

    def set(self, *pairs):
        """Writes to shared memory what products or copies read next."""
        for ref, x in pairs:
            ref[...] = x.astype(ref.dtype)
        self.gpu.commit_smem()

    def store(self, *pairs):
        """Starts copies from shared memory."""
        for ref, target in pairs:
            self.gpu.copy_smem_to_gmem(ref, target, commit_group=False)
        self.gpu.commit_smem_to_gmem_group()

    def stored(self):
        """Waits until what is being copied may be overwritten."""
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
                (C, p.H), (C, p.H), (C, _COLUMNS), (C, C), (C, C), (C,), (C,),
            ),
            init_carry=p.initial(initial),
        )(
            p.of_keys(q), p.of_keys(k), p.of_values(v),
            *map(p.of_head, (solve, scores, start, end)),
        )  # fmt: skip
        p.stored()
        p.finish(state, final)

    half = p.scratch(C, _COLUMNS)
    pl.run_scoped(with_scratch, p.scratch(p.H, _COLUMNS), half, half, half)


def _backward_kernel(
    q, k, v, solve, scores, start, end, whole, states, d_out, d_final,
    d_q, d_k, d_v, d_solve, d_scores, d_start, d_end, d_whole, d_initial,
):  # fmt: skip
    p = _Program(k, v)

    def order(z):
        return p.chunks - 1 - z

    def with_scratch(held, errors, news, d_news, x, y, outs):
        def visit(index, q, k, v, solve, scores, start, end, states, d_out, d_state):
            z = order(index[0])
            p.stored()
            d_out_values = d_out[...].astype(jnp.float32)
            read = p.product(k, states)
            p.set(
                (held, d_state),
                (errors, v[...].astype(jnp.float32) - p.scale(start, read)),
                (x, p.scale(start, d_out_values)),
                (outs.whole, (states[...].astype(jnp.float32) * d_state).sum(1)),
            )
            new, written = p.product(solve, errors), p.product(k, held)
            d_new = p.product(transposed(scores), d_out) + p.scale(end, written)
            p.set(
                (news, new), (d_news, d_new), (y, p.scale(end, new)),
                (outs.end, (new * written).sum(1)),
            )  # fmt: skip
            d_error = p.product(transposed(solve), d_news)
            queried = p.product(q, states)
            p.set(
                (outs.start, (d_out_values * queried - d_error * read).sum(1)),
                (outs.v, d_error),
                (outs.scores, p.product(d_out, transposed(news))),
                (outs.solve, p.product(d_news, transposed(errors))),
                (outs.q, p.product(x, transposed(states))),
            )
            d_keys = p.product(y, transposed(held))
            d_state = whole[p.batch, p.head, z] * d_state + p.product(transposed(q), x)
            p.set((errors, p.scale(start, d_error)))
            p.set((outs.k, d_keys - p.product(errors, transposed(states))))
            tokens, own = pl.ds(z * C, C), (p.part, p.batch)
            p.store(
                (outs.q, d_q.at[(*own, tokens, p.head)]),
                (outs.k, d_k.at[(*own, tokens, p.head)]),
                (outs.v, p.of_values(d_v).at[tokens]),
                (outs.solve, d_solve.at[(*own, p.head, tokens)]),
                (outs.scores, d_scores.at[(*own, p.head, tokens)]),
                (outs.start, d_start.at[(*own, p.head, tokens)]),
                (outs.end, d_end.at[(*own, p.head, tokens)]),
                (outs.whole, d_whole.at[(*own, p.head, pl.ds(z * p.H, p.H))]),
            )
            return d_state - p.product(transposed(k), errors)

        d_state = p.gpu.emit_pipeline(
            visit,
            grid=(p.chunks,),
            in_specs=p.blocks(
                order,
                (C, p.H), (C, p.H), (C, _COLUMNS), (C, C), (C, C), (C,), (C,),
                (p.H, _COLUMNS), (C, _COLUMNS),
            ),
            init_carry=p.initial(d_final),
        )(
            p.of_keys(q), p.of_keys(k), p.of_values(v),
            *map(p.of_head, (solve, scores, start, end)), p.of_states(states), p.of_values(d_out),
        )  # fmt: skip
        p.stored()
        p.finish(d_state, d_initial)

    half, square = p.scratch(C, _COLUMNS), p.scratch(C, C, jnp.float32)
    keys, gates = p.scratch(C, p.H), p.gpu.SMEM((C,), jnp.float32)
    outs = _Gradients(
        q=keys, k=keys, v=half, solve=square, scores=square, start=gates, end=gates,
        whole=p.gpu.SMEM((p.H,), jnp.float32),
    )  # fmt: skip
    pl.run_scoped(
        with_scratch, p.scratch(p.H, _COLUMNS), half, half, half, half, half, outs
    )


class _Gradients(NamedTuple):
    q: Any
    k: Any
    v: Any
    solve: Any
    scores: Any
    start: Any
    end: Any
    whole: Any
