"""What the kernels for TPUs share: sizes of a core, their call, what they do with small arrays."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen3next_jax.ops.platform import platform

LANES = 128  # columns of a vector register and of a memory tile
VMEM_BYTES = 64 * 2**20  # vector memory of a v5p and its successors; the compiler's default is 16


def pallas_call(
    kernel: Callable,
    *,
    semantics: tuple[Literal["parallel", "arbitrary"], ...],
    vmem_bytes: int | None = VMEM_BYTES,
    **how: Any,
) -> Callable:
    """Returns `pl.pallas_call(kernel, **how)` for a TPU; on a CPU the kernel is interpreted.

    Args:
      kernel: the kernel.
      semantics: how the programs along each axis of the grid may run.
      vmem_bytes: vector memory that the kernel may use; None: the compiler's default.
      how: further arguments of `pl.pallas_call`.
    """

    def call(*arrays):
        # Under jax_enable_x64, Python scalars in a kernel and in the indices of its blocks would
        # be 64-bit, which a TPU does not support.
        with jax.enable_x64(False):
            return pl.pallas_call(
                kernel,
                interpret=platform() == "cpu",
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes
                ),
                **how,
            )(*arrays)

    return call


def column(row):
    """[1, C] → [C, 1], by a masked sum over lanes, which is exact.

    Rows are dense in a TPU's memory, where a column would fill whole lanes.
    """
    return jnp.where(_diagonal(row.shape[1]), row, 0).sum(1, keepdims=True)


def row(column):
    """[C, 1] → [1, C]."""
    return jnp.where(_diagonal(column.shape[0]), column, 0).sum(0, keepdims=True)


def _diagonal(size):
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return i == j


def dot(x, y, *, contract=(1, 0)):
    """The product of two matrices of one dtype over the given axes, in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
