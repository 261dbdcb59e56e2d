"""The small parts every layer is made of: how a weight is declared, norms, and the dense MLP.

`weight` is the one place where a parameter gets its shape, dtype, initial values and the names of
its axes; `parallel/mesh.py` alone says over which mesh axis each name is sharded. Modules compute
in the dtype of their input and cast weights to it where they are used.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.ops.cpu import bfloat16_product
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.parallel.mesh import active_mesh, all_gathered

Init = Callable[[Any, tuple[int, ...]], jax.Array]


def weight(
    rngs: nnx.Rngs | None,
    init: Init,
    dtype: jax.typing.DTypeLike = jnp.float32,
    **axes: int,
) -> nnx.Param:
    """Declares a parameter.

    Args:
      rngs: keys for `init`; None if it draws nothing, which it then must not.
      init: initialiser, from a key and a shape to float32 values.
      dtype: dtype of the parameter.
      axes: logical name and size of each axis, in order. To use a name twice, append two
        underscores and a suffix, which are removed from the logical name.
    """
    if not isinstance(rngs, nnx.Rngs | None):
        raise ValueError(f"rngs is a {type(rngs).__name__}; give flax.nnx.Rngs(seed)")
    names = tuple(name.split("__")[0] for name in axes)
    key = None if rngs is None else rngs.params()
    return nnx.Param(init(key, tuple(axes.values())).astype(dtype), axes=names)


def normal(stddev: float) -> Init:
    """N(0, stddev²)."""
    return lambda key, shape: stddev * jax.random.normal(key, shape)


def constant(value: float) -> Init:
    """The same value everywhere."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def project(
    x: Array,
    w: Array,
    *,
    over: int = 1,
    into: Any = None,
    precision: jax.lax.Precision | None = None,
) -> Array:
    """Multiplies each token by a matrix whose rows or columns may span several axes.

    Args:
      x: tokens, [B, T, C...].
      w: matrix [C..., F...], in x's dtype.
      over: number of axes C to contract.
      into: dtype of the result; None: x's.
      precision: precision of the products; None: JAX's default, which `precision.matmul` sets.

    Returns:
      [B, T, F...].
    """
    if platform() != "cpu" or active_mesh() is not None:
        return jnp.tensordot(x, w, axes=over, preferred_element_type=into, precision=precision)
    # As a product of two plain matrices: if w's gradient contracts two axes of x, XLA:CPU first
    # transposes x or the cotangent, which takes longer than the product. On a mesh x is not
    # reshaped, to keep its sharding.
    rows = x.reshape(-1, math.prod(w.shape[:over]))
    w_matrix = w.reshape(rows.shape[1], -1)
    if x.dtype == jnp.bfloat16 and into is None:
        y = bfloat16_product(rows, w_matrix)
    else:
        y = jnp.matmul(rows, w_matrix, preferred_element_type=into, precision=precision)
    return y.reshape(*x.shape[:2], *w.shape[over:])


def rms_normalize(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """Normalises the last axis: x / rms(x), in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / rms(x) · (1 + w) with w starting at 0; float32 inside, cast once at the end.

    It is w that is zero-centred, so that weight decay pulls the factor to 1. Without
    `config.zero_centered_norm` it is x / rms(x) · w, with w starting at 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        param_dtype=jnp.float32,
    ):
        """Normalises a last axis of `size`, the hidden size when None."""
        del rngs  # nothing is drawn
        self.eps, self.zero_centered = config.rms_norm_eps, config.zero_centered_norm
        start = constant(0.0 if self.zero_centered else 1.0)
        self.weight = weight(None, start, param_dtype, norm=size or config.hidden_size)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis.

        Raises:
          ValueError: x is not of floats, or its last axis of another size.
        """
        x, size = jnp.asarray(x), self.weight.shape[0]
        if x.shape[-1:] != (size,) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x is {x.dtype}{list(x.shape)}; expected floats [..., {size}]")
        scale = self.weight[...].astype(jnp.float32)
        if self.zero_centered:
            scale += 1
        # An explicit broadcast, whose transpose is one sum over all leading axes. The broadcast
        # implied by `*` leaves axes of size 1 out of that sum, which takes XLA:CPU 20 times as
        # long.
        scale = jnp.broadcast_to(scale, x.shape)
        return (rms_normalize(x, self.eps) * scale).astype(x.dtype)


class MLP(nnx.Module):
    """down(silu(gate(x)) · up(x)), the feed-forward of dense layers and of shared experts."""

    def __init__(self, config: ModelConfig, width: int, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        """Builds a feed-forward of the given width."""
        D, init = config.hidden_size, normal(config.initializer_range)
        self.gate_proj = weight(rngs, init, param_dtype, embed=D, mlp=width)
        self.up_proj = weight(rngs, init, param_dtype, embed=D, mlp=width)
        self.down_proj = weight(rngs, init, param_dtype, mlp=width, embed=D)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps each token by itself."""
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        gate, up, down = (all_gathered(w, x.dtype) for w in weights)
        return project(jax.nn.silu(project(x, gate)) * project(x, up), down)
