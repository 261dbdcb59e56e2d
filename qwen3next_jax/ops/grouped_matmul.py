"""One matrix product per group of rows: what a mixture of experts spends its time in.

    y_r = x_r W_e(r)     rows sorted by group, group_sizes[e] of them for group e

Implementations differ in what the platform is good at:
- "pallas": the kernels of `megablox`, which come with JAX, for TPUs. On a CPU they are interpreted,
  which is for tests only.
- "hopper": kernels for NVIDIA's H100 and H200 (`pallas/grouped_hopper.py`), for groups of whole
  blocks in bfloat16.
- "blocked": groups are padded to whole blocks of rows and each block is one plain product in a
  loop, which is what matrix libraries are fast at. Blocks without rows are not visited, so that the
  matrices of groups without rows are not read, and reading matrices is what decoding waits for.
- "reference": a sum over groups of masked products.

Not `jax.lax.ragged_dot`: XLA multiplies every row by every group's matrix on a CPU and on an NVIDIA
GPU (jaxlib 0.10 to 0.12), and on a TPU in its gradient by the weights.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.pallas import grouped_hopper
from qwen3next_jax.ops.platform import check_platform, is_hopper, platform
from qwen3next_jax.ops.shapes import check_shape

MOST_ROWS = 128  # of a block
# Up to so many rows of a group a CPU takes each by itself (`expert_mlp`). Where matrices fit into
# its caches that would be faster up to 8.
_SINGLE = 2
_GPU_ROWS = 512  # where a GPU has no kernels, and rows are many
_TILE_ROWS, _TILE = 512, 1024  # of a kernel: three bfloat16 tiles, twice, fit a TPU's memory


def default_implementation(
    size: int, width: int, dtype: jnp.dtype, block: int | None = None
) -> str:
    """The implementation that suits the platform, the matrices and the blocks."""
    if platform() == "tpu":
        return "pallas"
    fits = block == grouped_hopper.ROWS and grouped_hopper.fits(size, width, dtype)
    return "hopper" if is_hopper() and fits else "blocked"


def row_alignment(*, mean: float, most: int) -> int:
    """The number of which each group's rows should be a multiple, on this platform.

    On a TPU 1, and on a CPU where groups have one or two. Elsewhere the rows of a block: the next
    power of two to the mean, but from 2 to 128. Below, a matrix would be read once more for each
    row; above, too many rows would be padding. GPUs without kernels copy a matrix for each block:
    where rows are many, it is one of 512.

    Args:
      mean: rows of a group, on average.
      most: rows that a group can have; a block has no more.
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
      rows: sorted by group; rows beyond the last group belong to none, and what they give, or get
        as gradient, may be anything.
      weights: one matrix a group.
      group_sizes: rows of each group.
      implementation: "pallas", "hopper", "blocked" or "reference"; None: the platform's default.
      block: for "blocked" and "hopper", of what all group sizes are multiples, as `row_alignment`
        gives it; others don't read it. None: sizes are any; rows are moved to where blocks begin,
        and back.

    Returns:
      Products in rows' dtype, accumulated in float32.

    Raises:
      ValueError: for arrays of other shapes, an unknown implementation, or rows that "blocked"
        cannot cut into blocks.
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
    check_shape("group_sizes", group_sizes, E)
    if implementation is None:
        implementation = default_implementation(D, F, rows.dtype, block)
    if implementation not in implementations:
        raise ValueError(f"{implementation=} is unknown; expected one of {sorted(implementations)}")
    if implementation == "blocked" and block is not None and len(rows) % block:
        raise ValueError(
            f"implementation='blocked' needs a multiple of {block=} rows, got {len(rows)}"
        )
    if implementation == "hopper":
        check_platform(implementation)
        D, F = weights.shape[1:]
        if block != grouped_hopper.ROWS or not grouped_hopper.fits(D, F, rows.dtype):
            raise ValueError(
                f"implementation='hopper' needs block={grouped_hopper.ROWS}, bfloat16 and matrices "
                f"of multiples of 256, got {block=}, {rows.dtype} and [{D}, {F}]; use 'blocked'"
            )
    # Numpy's arrays take no index that is traced.
    return implementations[implementation](*map(jnp.asarray, (rows, weights, group_sizes)))


def _reference(rows, weights, group_sizes):
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(len(rows))
    member = (index[:, None] >= ends - group_sizes) & (index[:, None] < ends)
    # What rows of no group hold must not reach the weights' gradients, not even times 0.
    rows = jnp.where(member.any(1, keepdims=True), rows, 0)
    out = jnp.einsum("rd,edf,re->rf", rows, weights, member.astype(rows.dtype))
    return jnp.where(member.any(1, keepdims=True), out, 0)


@jax.custom_vjp
def _pallas(rows, weights, group_sizes):
    return _gmm(rows, weights, group_sizes)


def _pallas_forward(rows, weights, group_sizes):
    return _pallas(rows, weights, group_sizes), (rows, weights, group_sizes)


def _pallas_backward(residuals, d_out):
    rows, weights, group_sizes = residuals
    d_rows = _gmm(d_out.astype(rows.dtype), weights, group_sizes, transpose_rhs=True)
    d_weights = tgmm(
        _whole_tiles(rows).T, _whole_tiles(d_out.astype(rows.dtype)), group_sizes.astype(jnp.int32),
        weights.dtype, _tiling(rows.shape[1], weights.shape[2]), interpret=platform() == "cpu",
    )  # fmt: skip
    return d_rows, d_weights, None


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _gmm(rows, weights, group_sizes, *, transpose_rhs=False):
    inner, outer = weights.shape[1:][::-1] if transpose_rhs else weights.shape[1:]
    out = gmm(
        _whole_tiles(rows), weights, group_sizes.astype(jnp.int32), rows.dtype,
        _tiling(inner, outer), transpose_rhs=transpose_rhs, interpret=platform() == "cpu",
    )  # fmt: skip
    return out[: len(rows)]


def _whole_tiles(rows):
    return jnp.pad(rows, ((0, -len(rows) % _TILE_ROWS), (0, 0)))


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
    moved = jnp.cumsum(sizes) - sizes - (ends - group_sizes)  # how far each group's rows are
    place = index + moved.at[group].get(mode="fill", fill_value=R + E * block)
    spread = jnp.zeros((-(-R // block) * block + E * block, rows.shape[1]), rows.dtype)
    spread = spread.at[place].set(rows, mode="drop")
    return _blocked(spread, weights, sizes, block).at[place].get(mode="clip")


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


def groups_of_blocks(group_sizes, rows, block):
    """The group of each block, one too many where there is none, and how many blocks have one."""
    ends = jnp.cumsum(group_sizes) // block
    index = jnp.arange(rows // block)
    # Neither blocks nor groups are many: comparing all is fewer operations than searching.
    return jnp.searchsorted(ends, index, side="right", method="compare_all"), ends[-1]


def _block(x, i, block):
    return jax.lax.dynamic_slice_in_dim(x, i * block, block)


def _set_block(x, i, values, block):
    return jax.lax.dynamic_update_slice_in_dim(x, values.astype(x.dtype), i * block, axis=0)
