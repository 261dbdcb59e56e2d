"""One matrix product per group of rows, which dominates the time of a mixture of experts.

    y_r = x_r W_e(r)     rows sorted by group, group_sizes[e] of them for group e

Implementations:
- "pallas": the `megablox` kernels that come with JAX, for TPUs. On a CPU they are interpreted, for
  tests only.
- "hopper": kernels for NVIDIA's H100 and H200 (`pallas/grouped_hopper.py`), for groups of whole
  blocks in bfloat16.
- "blocked": groups are padded to whole blocks of rows, and a loop multiplies each block by one
  plain matrix product, at which matrix libraries are fast. The loop skips blocks without rows, so
  the matrices of empty groups are not read; decoding is bound by reading matrices.
- "reference": a sum over groups of masked products.

`jax.lax.ragged_dot` is not used: XLA multiplies every row by every group's matrix on a CPU and on
an NVIDIA GPU (jaxlib 0.10 to 0.12), and on a TPU in the gradient of the weights.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.pallas import grouped_hopper
from qwen3next_jax.ops.platform import check_implementation, is_hopper, platform
from qwen3next_jax.ops.shapes import check_rows, check_shape, pad_to_multiple, require_floats

MOST_ROWS = 128  # largest block, except on GPUs without kernels
# Groups of up to this many rows on average are multiplied row by row on a CPU (`expert_mlp`). For
# matrices that fit into the CPU's caches, up to 8 would be faster.
_SINGLE = 2
_GPU_ROWS = 512  # rows of a block on a GPU without kernels, if groups have many rows
# Tile of the TPU kernels: three bfloat16 tiles, double-buffered, fit into a TPU's vector memory.
_TILE_ROWS, _TILE = 512, 1024


def default_implementation(
    size: int, width: int, dtype: jnp.dtype, block: int | None = None
) -> str:
    """Returns the best implementation for this platform, matrices [size, width] and block size."""
    if platform() == "tpu":
        return "pallas"
    fits = block == grouped_hopper.ROWS and grouped_hopper.fits(size, width, dtype)
    return "hopper" if is_hopper() and fits else "blocked"


def row_alignment(*, mean: float, most: int) -> int:
    """Returns the block size to which each group's number of rows should be rounded up.

    It is 1 on a TPU, and on a CPU for groups of one or two rows. Elsewhere it is the mean rounded
    up to a power of two, within 2 and 128: smaller blocks would read a matrix more often, and
    larger ones would mostly be padding. GPUs without kernels copy a matrix for each block, so their
    blocks have 512 rows if groups have many.

    Args:
      mean: average number of rows of a group.
      most: largest number of rows that a group can have; upper limit of the result.
    """
    if platform() == "tpu" or (platform() == "cpu" and mean <= _SINGLE):
        return 1
    larger = platform() == "gpu" and not is_hopper() and mean >= 2 * _GPU_ROWS
    limit = _GPU_ROWS if larger else MOST_ROWS
    return min(max(1 << (math.ceil(mean) - 1).bit_length(), 2), most, limit)


def grouped_matmul(
    rows: Float[Array, "R D"],
    weights: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
    block: int | None = None,
) -> Float[Array, "R F"]:
    """Multiplies each row by its group's matrix.

    Args:
      rows: input rows, sorted by group. Rows after the last group's belong to no group; their
        results and gradients are undefined.
      weights: one matrix per group.
      group_sizes: number of rows of each group.
      implementation: "pallas", "hopper", "blocked" or "reference"; None: the platform's default.
      block: for "blocked" and "hopper", a common divisor of all group sizes, as `row_alignment`
        returns it; not used by the others. None: group sizes are arbitrary, and "blocked" copies
        rows to aligned positions and their results back.

    Returns:
      Products in rows' dtype, accumulated in float32.

    Raises:
      ValueError: for arrays of other shapes or not of floats, an unknown implementation, a number
        of rows that "blocked" cannot split into blocks, or a platform, block or matrices that
        "hopper" does not support.
    """
    implementations: dict[str, Callable[..., Array]] = {
        "pallas": _pallas,
        "hopper": _hopper,
        "blocked": _realigned if block is None else lambda *args: _blocked(*args, block),
        "reference": _reference,
    }
    check_shape("weights", weights, "E", "D", "F")
    E, D, F = weights.shape
    check_shape("rows", rows, "R", D)
    check_rows((E,), group_sizes=group_sizes)
    require_floats(rows=rows, weights=weights)
    group_sizes = group_sizes.astype(jnp.int32)
    if implementation is None:
        implementation = default_implementation(D, F, rows.dtype, block)
    check_implementation(implementation, *implementations)
    if implementation == "blocked" and block is not None and len(rows) % block:
        raise ValueError(
            f"implementation='blocked' needs a multiple of {block=} rows, got {len(rows)}"
        )
    if implementation == "hopper" and (
        block != grouped_hopper.ROWS or not grouped_hopper.fits(D, F, rows.dtype)
    ):
        raise ValueError(
            f"implementation='hopper' needs block={grouped_hopper.ROWS}, bfloat16 and matrices of "
            f"multiples of 256, got {block=}, {rows.dtype} and [{D}, {F}]; use 'blocked'"
        )
    # NumPy arrays cannot be indexed by tracers.
    return implementations[implementation](*map(jnp.asarray, (rows, weights, group_sizes)))


def _reference(rows, weights, group_sizes):
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(len(rows))
    member = (index[:, None] >= ends - group_sizes) & (index[:, None] < ends)
    # Rows of no group may hold NaN, which must not reach the weights' gradients, not even times 0.
    rows = jnp.where(member.any(1, keepdims=True), rows, 0)
    out = jnp.einsum("rd,edf,re->rf", rows, weights, member.astype(rows.dtype))
    return jnp.where(member.any(1, keepdims=True), out, 0).astype(rows.dtype)


@jax.custom_vjp
def _pallas(rows, weights, group_sizes):
    return _gmm(rows, weights, group_sizes)


def _pallas_forward(rows, weights, group_sizes):
    return _pallas(rows, weights, group_sizes), (rows, weights, group_sizes)


def _pallas_backward(residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = _gmm(d_out, weights, group_sizes, transpose_rhs=True)
    d_weights = tgmm(
        pad_to_multiple(rows, _TILE_ROWS, axis=0).T,
        pad_to_multiple(d_out, _TILE_ROWS, axis=0),
        group_sizes,
        weights.dtype,
        _tiling(rows.shape[1], weights.shape[2]),
        interpret=platform() == "cpu",
    )
    return d_rows, d_weights, None


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _gmm(rows, weights, group_sizes, *, transpose_rhs=False):
    inner, outer = weights.shape[1:][::-1] if transpose_rhs else weights.shape[1:]
    out = gmm(
        pad_to_multiple(rows, _TILE_ROWS, axis=0),
        weights,
        group_sizes,
        rows.dtype,
        _tiling(inner, outer),
        transpose_rhs=transpose_rhs,
        interpret=platform() == "cpu",
    )
    return out[: len(rows)]


def _tiling(inner, outer):
    return _TILE_ROWS, min(_TILE, inner), min(_TILE, outer)


@jax.custom_vjp
def _hopper(rows, weights, group_sizes):
    groups, _ = groups_of_blocks(group_sizes, len(rows), grouped_hopper.ROWS)
    return grouped_hopper.grouped_product(rows, weights, groups)


def _hopper_forward(rows, weights, group_sizes):
    return _hopper(rows, weights, group_sizes), (rows, weights, group_sizes)


def _hopper_backward(residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = _hopper(d_out, weights.swapaxes(1, 2), group_sizes)
    return d_rows, grouped_hopper.grouped_outer(rows, d_out, group_sizes), None


_hopper.defvjp(_hopper_forward, _hopper_backward)


def _realigned(rows, weights, group_sizes):
    E, R, block = len(weights), len(rows), MOST_ROWS
    sizes = -(-group_sizes // block) * block
    ends, index = jnp.cumsum(group_sizes), jnp.arange(R)
    group = jnp.searchsorted(ends, index, side="right")
    shift = jnp.cumsum(sizes) - sizes - (ends - group_sizes)  # [E], of each group's rows
    target = index + shift.at[group].get(mode="fill", fill_value=R + E * block)
    aligned = jnp.zeros((-(-R // block) * block + E * block, rows.shape[1]), rows.dtype)
    aligned = aligned.at[target].set(rows, mode="drop")
    return _blocked(aligned, weights, sizes, block).at[target].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(rows, weights, group_sizes, block):
    def visit(i, out):
        x, w = _block(rows, i, block), weights[group[i]]
        return _set_block(out, i, jnp.dot(x, w, preferred_element_type=jnp.float32), block)

    group, used = groups_of_blocks(group_sizes, len(rows), block)
    out = jnp.zeros((len(rows), weights.shape[2]), rows.dtype)
    return jax.lax.fori_loop(0, used, visit, out)


def _blocked_forward(rows, weights, group_sizes, block):
    return _blocked(rows, weights, group_sizes, block), (rows, weights, group_sizes)


def _blocked_backward(block, residuals, d_out):
    rows, weights, group_sizes = residuals
    group, used = groups_of_blocks(group_sizes, len(rows), block)

    def visit(i, carry):
        d_rows, d_weights = carry
        x, d_y, w = _block(rows, i, block), _block(d_out, i, block), weights[group[i]]
        d_x = jnp.einsum("rf,df->rd", d_y, w, preferred_element_type=jnp.float32)
        d_w = jnp.einsum("rd,rf->df", x, d_y, preferred_element_type=jnp.float32)
        return _set_block(d_rows, i, d_x, block), d_weights.at[group[i]].add(d_w)

    start = (jnp.zeros_like(rows), jnp.zeros(weights.shape, jnp.float32))
    d_rows, d_weights = jax.lax.fori_loop(0, used, visit, start)
    return d_rows, d_weights.astype(weights.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def groups_of_blocks(
    group_sizes: Int[Array, "E"], rows: int, block: int
) -> tuple[Int[Array, "Z"], Int[Array, ""]]:
    """Finds the group of each block of rows.

    Args:
      group_sizes: number of rows of each group, multiples of block.
      rows: number of all rows, of which the groups' rows are the first.
      block: number of rows of a block.

    Returns:
      The group of each of the Z = rows // block blocks, E for blocks of no group; and the number of
      blocks that belong to a group, which come first.
    """
    ends = jnp.cumsum(group_sizes) // block
    index = jnp.arange(rows // block)
    # Blocks and groups are few, so comparing all pairs takes fewer operations than a binary search.
    return jnp.searchsorted(ends, index, side="right", method="compare_all"), ends[-1]


def _block(x, i, block):
    return jax.lax.dynamic_slice_in_dim(x, i * block, block)


def _set_block(x, i, values, block):
    return jax.lax.dynamic_update_slice_in_dim(x, values.astype(x.dtype), i * block, axis=0)
