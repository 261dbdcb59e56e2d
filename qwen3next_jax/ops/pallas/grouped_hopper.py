"""Grouped products for NVIDIA's Hopper GPUs, such as the H100 and H200.

Each group's rows fill whole blocks, so each block is multiplied by a single matrix, and the kernel
differs from a plain product only in which matrix a block reads. As many programs as the chip has
multiprocessors loop over the tiles of the result; in each, one warp group prefetches factors and
two multiply. The gradient of a matrix is a sum over its group's rows, which one warp group fetches
and multiplies a few at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

# `mosaic_gpu` is imported inside functions, because jaxlib contains it only on Linux.

ROWS = 128  # rows of a block, and of a tile
_COLUMNS = 256  # columns of a tile, half for each of the two warp groups that multiply
_DEPTH = 64  # depth of a tile's factors per step: 128 bytes of bfloat16, the width of a swizzle
_AHEAD = 4  # steps whose factors are in shared memory: 192 of the 227 KiB of a program
_STORED = 64  # rows and columns that are written at a time
_PROCESSORS = 132  # multiprocessors of the largest of these chips; on others, programs take turns


def fits(size: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether these kernels support products [R, size] · [size, width] and their gradients."""
    return size % _COLUMNS == 0 and width % _COLUMNS == 0 and dtype == jnp.bfloat16


def grouped_product(
    rows: Float[Array, "R D"], matrices: Float[Array, "E D F"], groups: Int[Array, "Z"]
) -> Float[Array, "R F"]:
    """Multiplies each block of rows by its group's matrix; see `grouped_matmul`.

    Args:
      rows: bfloat16 rows; R = Z · `ROWS`.
      matrices: bfloat16 matrices; D is a multiple of 64, F of 256.
      groups: group of each block; the results of blocks with a group E are undefined.

    Returns:
      Products in bfloat16, accumulated in float32.
    """
    from jax.experimental.pallas import mosaic_gpu as gpu

    kernel = gpu.kernel(
        _product_kernel,
        out_type=jax.ShapeDtypeStruct((len(rows), matrices.shape[2]), rows.dtype),
        grid=(_PROCESSORS,),
        grid_names=("processor",),
        num_threads=3,
        thread_name="warps",
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )
    return kernel(groups.clip(max=len(matrices) - 1).astype(jnp.int32), rows, matrices)


def _product_kernel(groups, rows, matrices, out):
    from jax.experimental.pallas import mosaic_gpu as gpu

    (R, D), F = rows.shape, matrices.shape[2]
    across = F // _COLUMNS
    tiled = gpu.TilingTransform((8, _DEPTH)), gpu.SwizzleTransform(128)  # type: ignore[abstract]

    def walk(multiply, store):
        return gpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(D // _DEPTH,),
            in_specs=[
                gpu.BlockSpec((ROWS, _DEPTH), lambda step: (0, step), transforms=tiled),
                gpu.BlockSpec((_DEPTH, _COLUMNS), lambda step: (step, 0), transforms=tiled),
            ],
            max_concurrent_steps=_AHEAD,
            memory_registers=40,
            wg_axis="warps",
            num_compute_wgs=2,
            compute_context=store,
        )

    def nothing(*_):
        pass

    def with_memory(held, staged):
        half = jax.lax.axis_index("warps")
        half_columns = pl.ds(half * (_COLUMNS // 2), _COLUMNS // 2)

        @gpu.nd_loop((R // ROWS * across,), collective_axes="processor")
        def _(loop):
            # Consecutive tiles share their rows; the next block's tiles mostly share the matrix.
            block, column = jax.lax.div(loop.index[0], across), jax.lax.rem(loop.index[0], across)
            tile_rows, tile_columns = pl.ds(block * ROWS, ROWS), pl.ds(column * _COLUMNS, _COLUMNS)

            def multiply(_, x, w, total):
                gpu.wgmma(total, x, w.at[:, half_columns])
                gpu.wgmma_wait(0)
                return total

            def store(run):
                def with_total(total):
                    run(total)
                    made = total[...].astype(out.dtype)
                    gpu.wait_smem_to_gmem(0, wait_read_only=True)
                    target = out.at[tile_rows, tile_columns].at[:, half_columns]
                    pieces = [
                        (pl.ds(i, _STORED), pl.ds(j, _STORED))
                        for i in range(0, ROWS, _STORED)
                        for j in range(0, _COLUMNS // 2, _STORED)
                    ]
                    for n, piece in enumerate(pieces):
                        place = staged.at[half, n % 2]
                        gpu.wait_smem_to_gmem(1, wait_read_only=True)
                        i, j = (p.start for p in piece)
                        place[...] = made[i : i + _STORED, j : j + _STORED]
                        gpu.commit_smem()
                        gpu.copy_smem_to_gmem(place, target.at[piece])

                pl.run_scoped(with_total, gpu.ACC((ROWS, _COLUMNS // 2), jnp.float32))

            factors = rows.at[tile_rows], matrices.at[groups[block], :, tile_columns]
            walk(multiply, store)(*factors, allocations=held)

    pl.run_scoped(
        with_memory,
        walk(nothing, nothing).get_allocations(rows, matrices.at[0]),
        gpu.SMEM((2, 2, _STORED, _STORED), out.dtype, transforms=tiled),
        collective_axes="warps",
    )
    gpu.wait_smem_to_gmem(0, wait_read_only=True)


def grouped_outer(
    x: Float[Array, "R D"], y: Float[Array, "R F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Sums xᵀ y over each group's rows; the sum is zero for a group without rows.

    Args:
      x, y: bfloat16 rows, sorted by group; D and F are multiples of 128.
      group_sizes: number of rows of each group, multiples of `ROWS`.

    Returns:
      Sums in bfloat16, accumulated in float32.
    """
    from jax.experimental.pallas import mosaic_gpu as gpu

    starts = jnp.cumsum(group_sizes) - group_sizes
    kernel = gpu.kernel(
        _outer_kernel,
        out_type=jax.ShapeDtypeStruct((len(group_sizes), x.shape[1], y.shape[1]), x.dtype),
        grid=(_PROCESSORS,),
        grid_names=("processor",),
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
    )
    return kernel(starts.astype(jnp.int32), group_sizes.astype(jnp.int32), x, y)


def _outer_kernel(starts, sizes, x, y, out):
    from jax.experimental.pallas import mosaic_gpu as gpu

    E, D, F = out.shape
    side = 128
    across = F // side
    tiled = gpu.TilingTransform((8, _DEPTH)), gpu.SwizzleTransform(128)  # type: ignore[abstract]

    @gpu.nd_loop((E, D // side * across), collective_axes="processor")
    def _(loop):
        group, tile = loop.index
        down, right = (
            pl.ds(i * side, side) for i in (jax.lax.div(tile, across), jax.lax.rem(tile, across))
        )
        # The slice may extend past the arrays' ends, but the pipeline does not read there.
        its_rows = pl.ds(pl.multiple_of(starts[group], ROWS), len(x))

        def with_total(total):
            def add(_, x, y):
                gpu.wgmma(total, transposed(x), y)

            @pl.when(sizes[group] > 0)
            def _():
                gpu.emit_pipeline(
                    add,
                    grid=(jax.lax.div(sizes[group], _DEPTH),),
                    in_specs=[
                        gpu.BlockSpec(
                            (_DEPTH, side),
                            lambda step: (step, 0),
                            delay_release=1,
                            transforms=tiled,
                        )
                    ]
                    * 2,
                    max_concurrent_steps=_AHEAD,
                )(x.at[its_rows, down], y.at[its_rows, right])

            return total[...]

        made = pl.run_scoped(with_total, gpu.ACC((side, side)))

        def with_staged(staged):
            staged[...] = made.astype(out.dtype)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(staged, out.at[group, down, right])
            gpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(with_staged, gpu.SMEM((side, side), out.dtype, transforms=tiled))


def transposed(x: Any) -> Any:
    """A transposed view of a block in shared memory, as a factor of products."""
    if hasattr(x, "transpose"):
        return x.transpose((1, 0))
    from jax.experimental.pallas import mosaic_gpu as gpu

    return gpu.transpose_ref(x, (1, 0))  # JAX 0.10
