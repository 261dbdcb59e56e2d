"""Causal attention by the splash attention kernels that come with JAX, for TPUs.

They visit the blocks of a causal mask's lower triangle, and the scores never leave the chip. They
support segment ids and grouped heads, and save the logsumexp of each query's scores, with which the
backward pass recomputes the weights. Documents are only masked; no block is skipped for them. The
library states no costs, so this module adds them (`kernel_costs.py`), for the blocks that the
causal mask does not skip.

The backward pass is one kernel for queries and one for keys and values, together seven products per
pair of blocks. The library's fused kernel needs five, but writes a gradient of the queries for each
block of keys, and summing these takes longer than two products, by the TPU compiler's estimate.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.pallas.kernel_costs import stating
from qwen3next_jax.ops.pallas.tpu import LANES
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.ops.shapes import pad_to_multiple

# The `checkpoint_name` of attention's results that the backward pass needs: outputs and logsumexps.
KEPT = "attention"
_BLOCK = 512  # number of queries, and of keys, of a block


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K P"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N P"]:
    """Attends causally inside segments; on a CPU the kernels are interpreted, for tests only.

    Args:
      q, k, v: queries, keys and values; KV head i serves the N / K query heads from i · N / K on.
      segment_ids: segment id of each token, at least 0.

    Returns:
      Outputs in v's dtype.
    """
    T, H = q.shape[1], q.shape[-1]
    block = LANES if T <= _BLOCK else _BLOCK
    segments = pad_to_multiple(segment_ids, block, constant_values=-1)
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    q, k, v = (pad_to_multiple(x, block).swapaxes(1, 2) for x in (q, k, v))
    walk = _Walk(q.shape[1], q.shape[2])
    return _attend(walk, q, k, v, segments).swapaxes(1, 2)[:, :T]


# Shapes below: q [B N T H], out [B N T P], k [B K T H], v [B K T P]; T is a multiple of the block.
# Under jax_enable_x64, the library's kernels would have 64-bit numbers, as ours would
# (`tpu.pallas_call`).


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@jax.enable_x64(False)
def _attend(walk, q, k, v, segments):
    return stating(walk.kernel(), walk.costs(q, v, (1, 1)))(q, k, v, segments)


@jax.enable_x64(False)
def _attend_forward(walk, q, k, v, segments):
    def differentiated(q, k, v, segments):
        kernel = walk.kernel()
        return jax.vjp(lambda *arrays: kernel(*arrays, segments), q, k, v)

    out, pull = stating(differentiated, walk.costs(q, v, (1, 1)))(q, k, v, segments)
    return out, (pull, q, v)  # `pull` holds q and v as well, so they take no extra memory


@jax.enable_x64(False)
def _attend_backward(walk, residuals, d_out):
    pull, q, v = residuals
    # The kernel for keys and values is called first, then the one for queries.
    costs = walk.costs(q, v, (2, 2), (2, 1))
    return *stating(lambda pull, d_out: pull(d_out), costs)(pull, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The loop over blocks of the lower triangle of `tokens` × `tokens`, for each query head."""

    heads: int
    tokens: int

    @property
    def block(self) -> int:
        return min(_BLOCK, self.tokens)

    def kernel(self):
        block = self.block
        sizes = splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dq=block,
            block_kv_dq=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
        )
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
        """The costs of kernels.

        Args:
          q, v: arrays that the kernels read.
          products: for each kernel, the number of products per pair of blocks of the size of H
            (such as Q Kᵀ) and of the size of P.
        """
        H, P = q.shape[-1], v.shape[-1]
        blocks = self.tokens // self.block
        pairs = q.shape[0] * self.heads * blocks * (blocks + 1) // 2
        scores = pairs * self.block**2
        # Blocks of one side are fetched for each pair, blocks of the other side once.
        rows = self.block * (pairs + 2 * q.shape[0] * self.heads * blocks)
        return [
            pl.CostEstimate(
                flops=2 * scores * (with_h * H + with_p * P),
                transcendentals=scores,
                bytes_accessed=rows * (H + P) * v.dtype.itemsize,
            )
            for with_h, with_p in products
        ]
