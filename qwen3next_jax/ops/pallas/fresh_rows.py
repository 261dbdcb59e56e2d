"""Memory for rows, with nothing in it."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qwen3next_jax.ops.platform import platform


def fresh_rows(size: int, rows: Float[Array, "R ..."]) -> Float[Array, "size ..."]:
    """As many rows as `size` says, like `rows`; what is not written is not to be read.

    On a TPU they are anything, as zeros would cost their price; elsewhere zeros.
    """
    shape = jax.ShapeDtypeStruct((size, *rows.shape[1:]), rows.dtype)
    if platform() != "tpu":
        return jnp.zeros(shape.shape, shape.dtype)
    # A kernel that writes nothing. It is given rows, so that it belongs to their layer: what hangs
    # on no layer, as `jax.lax.empty`, is taken out of the loop over layers and copied in each.
    where = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda rows, fresh: None, shape, in_specs=[where], out_specs=where, name="fresh_rows",
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0),
    )(rows)  # fmt: skip
