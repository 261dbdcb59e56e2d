"""Causal attention by the splash attention kernels that come with JAX, for TPUs.

They visit the blocks of a causal mask's lower triangle, and the scores never leave the chip. They
take segment ids and grouped heads, and save the logarithm of each query's norm, with which the
backward pass recomputes the scores. Documents are only masked: no block is skipped for them. The
library states no costs, so it is done here (`kernel_costs.py`); the mask tells which blocks are
skipped.

The backward pass is one kernel for queries and one for keys and values, together seven products a
pair of blocks. The library's fused kernel takes five, but writes a gradient of the queries for each
block of keys; summing these takes longer than two products, by the TPU compiler's estimate.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.pallas.kernel_costs import stating
from qwen3next_jax.ops.platform import platform

# What a backward pass needs of attention's results, by this name to `jax.checkpoint`'s policies:
# outputs and the logarithms of norms.
KEPT = "attention"
_LANES = 128
_BLOCK = 512  # of queries and of keys


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K P"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N P"]:
    """Attends causally inside segments; on a CPU the kernels are interpreted, for tests only."""
    T, H = q.shape[1], q.shape[-1]
    padding = -T % (_LANES if T <= _BLOCK else _BLOCK)
    segments = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1)
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    walk = _Walk(q.shape[1], q.shape[2])
    return _attend(walk, q, k, v, segments).swapaxes(1, 2)[:, :T]


# Below: q, out [B N T H], k, v [B K T H], T a multiple of the blocks.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(walk, q, k, v, segments):
    return stating(walk.kernel(), walk.costs(q, v, (1, 1)))(q, k, v, segments)


def _attend_forward(walk, q, k, v, segments):
    def differentiated(q, k, v, segments):
        kernel = walk.kernel()
        return jax.vjp(lambda *arrays: kernel(*arrays, segments), q, k, v)

    out, pull = stating(differentiated, walk.costs(q, v, (1, 1)))(q, k, v, segments)
    return out, (pull, q, v)  # which are among what `pull` holds, and so are held once


def _attend_backward(walk, residuals, d_out):
    pull, q, v = residuals
    # For keys and values, then for queries.
    costs = walk.costs(q, v, (2, 2), (2, 1))
    return *stating(lambda pull, d_out: pull(d_out), costs)(pull, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Over the blocks of the lower triangle of `tokens` × `tokens`, for each of the heads."""

    heads: int
    tokens: int

    @property
    def block(self) -> int:
        return min(_BLOCK, self.tokens)

    def kernel(self):
        block = self.block
        sizes = splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dq=block, block_kv_dq=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        )  # fmt: skip
        mask = splash.CausalMask((self.tokens, self.tokens))
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * self.heads),
            block_sizes=sizes,
            residual_checkpoint_name=KEPT,
            interpret=platform() == "cpu",
        )

        def rows(q, k, v, segments):
            return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

        return jax.vmap(rows)

    def costs(self, q, v, *products: tuple[int, int]) -> list[pl.CostEstimate]:
        """Of kernels with so many products over or into H, and over or into P, a pair of blocks."""
        H, P = q.shape[-1], v.shape[-1]
        blocks = self.tokens // self.block
        pairs = q.shape[0] * self.heads * blocks * (blocks + 1) // 2
        scores = pairs * self.block**2
        # One side's blocks are fetched for each pair, the other side's once.
        rows = self.block * (pairs + 2 * q.shape[0] * self.heads * blocks)
        return [
            pl.CostEstimate(
                flops=2 * scores * (with_h * H + with_p * P),
                transcendentals=scores,
                bytes_accessed=rows * (H + P) * v.dtype.itemsize,
            )
            for with_h, with_p in products
        ]
