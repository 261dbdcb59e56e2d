"""Forms that XLA's CPU backend is fast at; on other platforms the plain ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen3next_jax.ops.platform import platform

_COLUMNS = 32  # to which rows are folded before they are reduced


def once(function: Callable[..., Array], *args: Array) -> Array:
    """function(*args), computed once however many operations read it.

    XLA for CPUs computes elementwise operations again in each operation that reads them, and it
    removes optimization barriers before it decides that. A conditional stays if it cannot tell
    which branch is taken.

    Args:
      function: of arrays.
      args: of any shape and dtype; the last one holds numbers.
    """
    if platform() != "cpu" or not args[-1].size:
        return function(*args)
    return jax.lax.cond(jnp.ravel(args[-1])[0] > 0, function, function, *args)


def row_max(x: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """The largest entries along the last axis."""
    return _folded(jnp.maximum, x).max(-1)


def row_sum(x: Float[Array, "*B N"]) -> Float[Array, "*B"]:
    """The sums along the last axis."""
    return _folded(jnp.add, x).sum(-1)


def _folded(combine, x):
    """Halves put upon each other: entry by entry, which is fast, as a reduction of a row is not."""
    while platform() == "cpu" and x.shape[-1] > _COLUMNS and x.shape[-1] % 2 == 0:
        x = combine(*jnp.split(x, 2, axis=-1))
    return x
