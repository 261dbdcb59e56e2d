"""The short causal convolution and its SiLU as two TPU kernels, forward and backward.

`ops/causal_conv.py` has the equation. XLA makes several passes over the activations for it, and
writes each tap's gradient separately before it adds them up. Here a program takes `tokens` tokens
of `heads` heads, and the few tokens before them (backward: also after them) from neighbouring
blocks of the same array. Each array is read and written once; the backward kernel recomputes the
intermediate values. All but inputs and outputs is float32.

A bit mask per token, broadcast over the lanes, says which taps are in the token's own document:
bit s is set if the token s positions before is.
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

_HALO = 16  # tokens read from a neighbouring block: the smallest possible block in bfloat16
MOST_TAPS = _HALO
_TOKENS = 512  # tokens of a program
_CHANNELS = 1024  # channels of a program in bfloat16; its blocks fit the default VMEM limit


def can_compile(taps: int, head_size: int) -> bool:
    """Whether the kernels support heads of this size and filters of this length."""
    return head_size % LANES == 0 and taps <= MOST_TAPS


def causal_conv(
    x: Float[Array, "B T N H"],
    kernel: Float[Array, "W N H"],
    segments: Int[Array, "B T"],
    silu: bool,
) -> Float[Array, "B T N H"]:
    """Runs the kernels; on a CPU they are interpreted, for tests only.

    Args:
      x: inputs.
      kernel: taps, oldest first.
      segments: segment id of each token.
      silu: whether to apply SiLU to the sums.

    Returns:
      Outputs in x's dtype.
    """
    T, W = x.shape[1], len(kernel)
    own = sum(_same(segments, s).astype(jnp.int32) << s for s in range(W))
    block = min(_TOKENS, -(-T // _HALO) * _HALO)
    own = pad_to_multiple(own, block)[:, :, None]
    own = jnp.broadcast_to(own, (*own.shape[:2], LANES))
    # Heads before tokens: XLA lets the projections before and the delta rule after use this layout
    # at no cost.
    x = pad_to_multiple(x, block).swapaxes(1, 2)
    taps = kernel.astype(jnp.float32).swapaxes(0, 1)
    return _conv(x, taps, own, silu).swapaxes(1, 2)[:, :T]


def _same(segments, shift):
    """True where the token `shift` positions before exists and is of the same document."""
    earlier = jnp.pad(segments, ((0, 0), (shift, 0)))[:, : segments.shape[1]]
    return (earlier == segments) & (jnp.arange(segments.shape[1]) >= shift)


# Shapes below: x, out [B, N, T, H], taps [N, W, H] float32, own (the bit masks) [B, T, LANES].


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv(x, taps, own, silu):
    sizes = _Sizes(x, taps)
    given = x, x, own, taps
    return tpu.pallas_call(
        functools.partial(_forward_kernel, silu=silu),
        grid=sizes.grid,
        in_specs=[sizes.spec(name) for name in ("before", "here", "own", "taps")],
        out_specs=sizes.spec("here"),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        cost_estimate=sizes.cost(own, products=1, passes=2),
        name="causal_conv_forward",
        semantics=("parallel",) * 3,
        vmem_bytes=None,
    )(*given)


def _conv_forward(x, taps, own, silu):
    return _conv(x, taps, own, silu), (x, taps, own)


def _conv_backward(silu, residuals, d_out):
    x, taps, own = residuals
    sizes = _Sizes(x, taps)
    names = "before", "here", "behind", "here", "behind", "own", "own behind", "taps"
    d_x, d_taps = tpu.pallas_call(
        functools.partial(_backward_kernel, silu=silu),
        grid=sizes.grid,
        in_specs=[sizes.spec(name) for name in names],
        out_specs=[sizes.spec("here"), sizes.spec("d_taps")],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((*sizes.grid[:2], *taps.shape), jnp.float32),
        ],
        cost_estimate=sizes.cost(own, products=3, passes=3),
        name="causal_conv_backward",
        semantics=("parallel",) * 3,
        vmem_bytes=None,
    )(x, x, x, d_out, d_out, own, own, taps)
    return d_x, d_taps.sum((0, 1)), None


_conv.defvjp(_conv_forward, _conv_backward)


class _Sizes:
    """How the work is divided: a program takes `tokens` tokens of `heads` heads."""

    def __init__(self, x, taps):
        self.x, (self.N, self.W, self.H) = x, taps.shape
        B, _, T, _ = x.shape
        most = max(_CHANNELS * 2 // (self.H * x.dtype.itemsize), 1)
        self.tokens, self.heads = min(_TOKENS, T), math.gcd(self.N, most)
        # Heads are the last grid axis, so that consecutive programs share the block of `own`.
        self.grid = (B, T // self.tokens, self.N // self.heads)

    def spec(self, name):
        tokens, heads, H = self.tokens, self.heads, self.H
        halos = tokens // _HALO  # number of halo-sized blocks in a block
        last = self.grid[1] * halos - 1
        if name == "here":
            return pl.BlockSpec((1, heads, tokens, H), lambda b, z, n: (b, n, z, 0))
        if name == "own":
            return pl.BlockSpec((1, tokens, LANES), lambda b, z, n: (b, z, 0))
        if name == "taps":
            return pl.BlockSpec((heads, self.W, H), lambda b, z, n: (n, 0, 0))
        if name == "d_taps":
            return pl.BlockSpec((1, 1, heads, self.W, H), lambda b, z, n: (b, z, n, 0, 0))

        # At a row's ends there is no neighbour. Any valid block will do, because `own` and the
        # kernel mask it.
        def before(z):
            return jnp.maximum(z * halos - 1, 0)

        def behind(z):
            return jnp.minimum((z + 1) * halos, last)

        if name == "own behind":
            return pl.BlockSpec((1, _HALO, LANES), lambda b, z, n: (b, behind(z), 0))
        where = before if name == "before" else behind
        return pl.BlockSpec((1, heads, _HALO, H), lambda b, z, n: (b, n, where(z), 0))

    def cost(self, own, *, products, passes):
        """The cost of all programs together.

        Args:
          own: the bit masks.
          products: number of products per tap and entry of x.
          passes: number of arrays of x's size that are read or written.
        """
        return pl.CostEstimate(
            flops=2 * products * self.W * self.x.size,
            transcendentals=self.x.size,
            bytes_accessed=passes * self.x.size * self.x.dtype.itemsize + own.size * 4,
        )


def _forward_kernel(before_ref, x_ref, own_ref, taps_ref, out_ref, *, silu):
    own = own_ref[0]
    for head in range(x_ref.shape[1]):
        x = jnp.concatenate([before_ref[0, head], x_ref[0, head]]).astype(jnp.float32)
        out = _weighed(x, own, taps_ref[head])
        out_ref[0, head] = (_silu(out) if silu else out).astype(out_ref.dtype)


def _backward_kernel(
    before_ref,
    x_ref,
    behind_ref,
    d_out_ref,
    d_behind_ref,
    own_ref,
    own_behind_ref,
    taps_ref,
    d_x_ref,
    d_taps_ref,
    *,
    silu,
):
    tokens, (W, _) = x_ref.shape[2], taps_ref.shape[1:]
    own = jnp.concatenate([own_ref[0], own_behind_ref[0]])
    row = jax.lax.broadcasted_iota(jnp.int32, (tokens + _HALO, LANES), 0)
    exists = (row < tokens) | (pl.program_id(1) < pl.num_programs(1) - 1)
    own = jnp.where(exists, own, 0)
    for head in range(x_ref.shape[1]):
        x = jnp.concatenate([before_ref[0, head], x_ref[0, head], behind_ref[0, head]])
        x, taps = x.astype(jnp.float32), taps_ref[head]
        d_out = jnp.concatenate([d_out_ref[0, head], d_behind_ref[0, head]]).astype(jnp.float32)
        if silu:
            d_out *= _silu_slope(_weighed(x, own, taps))
        d_x = jnp.zeros((tokens, x.shape[1]), jnp.float32)
        for s in range(W):
            d_tap = _where_own(own, s, d_out)
            d_x += taps[W - 1 - s : W - s] * _earlier(d_tap, -s)[:tokens]
            products = d_tap[:tokens] * _earlier(x, s)[_HALO : _HALO + tokens]
            d_taps_ref[0, 0, head, W - 1 - s : W - s] = products.sum(0, keepdims=True)
        d_x_ref[0, head] = d_x.astype(d_x_ref.dtype)


def _weighed(x, own, taps):
    """The convolution at all rows of x after the halo."""
    W, total = len(taps), 0.0
    for s in range(W):
        total += taps[W - 1 - s : W - s] * _where_own(own, s, _earlier(x, s)[_HALO:])
    return total


def _earlier(x, shift):
    """Rolls rows so that row i holds row i − shift of x, cyclically."""
    return pltpu.roll(x, shift % len(x), 0) if shift else x


def _where_own(own, shift, x):
    own = jnp.tile(own, (1, x.shape[1] // LANES))
    return jnp.where((own & (1 << shift)) != 0, x, 0)


def _silu(x):
    return x * jax.nn.sigmoid(x)


def _silu_slope(x):
    share = jax.nn.sigmoid(x)
    return share * (1 + x * (1 - share))
