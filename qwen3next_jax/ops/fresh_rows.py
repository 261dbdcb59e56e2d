"""Uninitialised memory for rows that are about to be written."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qwen3next_jax.ops.platform import platform


def fresh_rows(size: int, rows: Float[Array, "R ..."]) -> Float[Array, "size ..."]:
    """An array of `size` rows of the shape and dtype of `rows`; write a row before reading it.

    On a TPU the contents are undefined, which saves the time of writing zeros; elsewhere they are
    zeros.
    """
    shape = jax.ShapeDtypeStruct((size, *rows.shape[1:]), rows.dtype)
    if platform() != "tpu":
        return jnp.zeros(shape.shape, shape.dtype)
    # A kernel that writes nothing. It takes `rows` so that its result depends on the layer: XLA
    # would hoist a layer-independent buffer, such as `jax.lax.empty`, out of the loop over layers
    # and copy it in each iteration.
    spec = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        lambda rows, fresh: None,
        shape,
        in_specs=[spec],
        out_specs=spec,
        name="fresh_rows",
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0),
    )(rows)
