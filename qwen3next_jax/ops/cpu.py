"""Operations in forms that XLA:CPU compiles to fast code; other platforms get the plain forms."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int

from qwen3next_jax.ops.platform import platform

_COLUMNS = 32  # width to which rows are folded before they are reduced
_SMALL = 32  # largest matrices, in rows and columns, that are multiplied entry by entry
_PARTS = 4  # independent partial sums; in a single chain each addition waits for the previous one


def once(function: Callable[..., Array], *args: Array) -> Array:
    """function(*args), computed once however many operations read it.

    XLA:CPU fuses elementwise operations into every operation that reads them, and so recomputes
    them; it removes optimization barriers before it decides that. It keeps a conditional if it
    cannot tell which branch is taken.

    Args:
      function: function of arrays.
      args: arrays of any shape and dtype; the last one must be numeric.
    """
    if platform() != "cpu" or not args[-1].size:
        return function(*args)
    return jax.lax.cond(jnp.ravel(args[-1])[0] > 0, function, function, *args)


def writable(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The dtype for an array of which a few entries at a time are written.

    It is `dtype`, but float32 for bfloat16 on a CPU: XLA:CPU converts all of a bfloat16 array, to
    float32 and back, for each write.
    """
    return jnp.float32 if platform() == "cpu" and dtype == jnp.bfloat16 else dtype


def gather(
    take: Callable[[Array, Array], Array], x: Float[Array, "..."], index: Int[Array, "..."]
) -> Float[Array, "..."]:
    """take(x, index), without a copy of all of x.

    XLA:CPU gathers bfloat16 as float32. It converts all of x first, and before a loop if it can, so
    that the loop reads a copy of twice the size.

    Args:
      take: indexes its first argument by its second; linear in the first.
      x: array of any shape and dtype.
      index: what to take.
    """
    if platform() != "cpu" or x.dtype != jnp.bfloat16:
        return take(x, index)
    return _gather_bits(take, x, index)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gather_bits(take, x, index):
    # Integers are gathered as they are. The barrier keeps XLA from moving the cast before a loop,
    # where it would be a copy; beside the gather it is fused with it.
    x, index = jax.lax.optimization_barrier((x, index))
    bits = take(jax.lax.bitcast_convert_type(x, jnp.uint16), index)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_gather_bits.defjvp
def _gather_bits_jvp(take, primals, tangents):  # a cast of bits has no derivative
    x, index = primals
    return _gather_bits(take, x, index), take(tangents[0], index)


@jax.custom_vjp
def bfloat16_product(
    x: BFloat16[Array, "I J"], y: BFloat16[Array, "J K"]
) -> BFloat16[Array, "I K"]:
    """Computes x @ y, summed in float32 and rounded once, and its gradients in the same way.

    XLA:CPU multiplies bfloat16 as it is only for a float32 result, else as float32 copies. Without
    a rule of its own, the gradient of such a product would multiply float32 by bfloat16, which
    takes five times as long.

    Args:
      x, y: the matrices.
    """
    return _product(x, y).astype(x.dtype)


# Plain code, which can be differentiated again, forward and backward.
def _product_forward(x, y):
    return _product(x, y).astype(x.dtype), (x, y)


def _product_backward(factors, d):
    x, y = factors
    d_x = jnp.einsum("ik,jk->ij", d, y, preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), product_over_rows(x, d).astype(y.dtype)


_product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
bfloat16_product.defvjp(_product_forward, _product_backward)


def product_over_rows(
    x: Float[Array, "*B R I"], y: Float[Array, "*B R J"]
) -> Float32[Array, "*B I J"]:
    """Computes xᵀ y in float32, which is how a weight's gradient sums over rows.

    Args:
      x, y: the matrices, in one dtype.
    """
    if platform() != "cpu" or x.dtype != jnp.bfloat16:
        return jnp.einsum("...ri,...rj->...ij", x, y, preferred_element_type=jnp.float32)
    # XLA:CPU multiplies bfloat16 as it is only if the left factor's last axis is summed over, and
    # makes a plain transpose part of the product; it keeps one that goes through a flat array.
    shape = *x.shape[:-2], x.shape[-1], x.shape[-2]
    flat = jax.lax.optimization_barrier(x.swapaxes(-1, -2).reshape(-1))
    # Transposed at once, the product would be one that jaxlib 0.10.2 compiles but cannot run.
    return jax.lax.optimization_barrier(_product(flat.reshape(shape), y))


def small_products(
    spec: str,
    x: Float[Array, "*A I J"],
    y: Float[Array, "*B K L"],
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "*C M N"]:
    """Computes jnp.einsum(spec, x, y) for batches of small matrices.

    XLA:CPU computes the products of a batch one after another, on one core, at 5 GFLOP/s for
    matrices of 16 rows and 15 to 20 GFLOP/s for 32. Entry by entry they run on all cores, 1.3 to 5
    times as fast. Matrices of 64 rows gain nothing.

    Args:
      spec: einsum of two arrays, without an ellipsis, that sums over exactly one axis. The last two
        axes of each array are a matrix, and the last axis of the result is one of these axes.
      x, y: the arrays.
      precision: precision of `jnp.einsum`; without effect on a CPU.
    """
    left, right, out = re.split(",|->", spec)
    if platform() != "cpu" or max(*x.shape[-2:], *y.shape[-2:]) > _SMALL:
        return jnp.einsum(spec, x, y, precision=precision)
    # The CPU vectorises over the result's last axis if it is the operands' last axis, too.
    x, left = _with_last_axis(out[-1], x, left)
    y, right = _with_last_axis(out[-1], y, right)
    # Without `once`, XLA would recompute the operands' expressions for each product.
    return once(functools.partial(_entry_by_entry, left, right, out), x, y)


def _with_last_axis(axis, x, axes):
    if axis not in axes or axes[-1] == axis:
        return x, axes
    return once(lambda x: x.swapaxes(-1, -2), x), axes[:-2] + axes[-1] + axes[-2]


def _entry_by_entry(left, right, out, x, y):
    (summed,) = set(left) & set(right) - set(out)
    order = [*out[:-1], summed, out[-1]]

    def placed(x, axes):
        x = x.transpose([axes.index(a) for a in order if a in axes])
        return jnp.expand_dims(x, [i for i, a in enumerate(order) if a not in axes])

    x, y = placed(x, left), placed(y, right)
    parts = min(_PARTS, x.shape[-2])
    x_parts, y_parts = (jnp.array_split(v, parts, axis=-2) for v in (x, y))
    return sum(axis_sum(a * b, -2) for a, b in zip(x_parts, y_parts, strict=True))


def axis_sum(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Computes x.sum(axis) in x's dtype, by code that XLA generates itself.

    Unless compiled with `ops.platform.compiler_options`, XLA:CPU hands reductions that it
    recognises as sums to the library YNNPACK. That is slower for sums of products, and with jaxlib
    0.10.2 it crashes if the products have eight axes, as products of small matrices may under
    `vmap`.

    Args:
      x: array of any shape.
      axis: axis to sum over; negative values count from the last axis.
    """
    # a − (−b) equals a + b, but XLA does not recognise it as a sum.
    return jax.lax.reduce(x, np.zeros((), x.dtype), lambda a, b: a - -b, (axis % x.ndim,))


def row_max(x: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """The largest entries along the last axis."""
    return _folded(jnp.maximum, x).max(-1)


def row_sum(x: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """The sums along the last axis."""
    return _folded(jnp.add, x).sum(-1)


def _folded(combine, x):
    """Combines the two halves of each row, repeatedly, down to an odd size or `_COLUMNS` entries.

    These are elementwise operations, which XLA:CPU vectorises; its reductions of a row are slow.
    """
    while platform() == "cpu" and x.shape[-1] > _COLUMNS and x.shape[-1] % 2 == 0:
        x = combine(*jnp.split(x, 2, axis=-1))
    return x
