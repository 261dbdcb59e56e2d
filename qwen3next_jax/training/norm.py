"""The norm of a tree of arrays, such as all gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen3next_jax.ops.cpu import row_sum
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.parallel.mesh import active_mesh

_SMALL = 1 << 16  # entries


def norm(tree: Any) -> Float[Array, ""]:
    """The square root of the sum of the squares of all entries of a tree of arrays, in float32."""
    arrays = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    if platform() != "cpu" or active_mesh() is not None:
        return jnp.sqrt(sum(((x * x).sum() for x in arrays), jnp.zeros(())))
    # XLA:CPU compiles each array's sum separately, which takes a tenth of the compile time of the
    # tiny model's step; so small arrays are concatenated. Large ones are summed by rows, since one
    # sum over a whole array takes three times as long.
    small = [x.ravel() for x in arrays if x.size <= _SMALL]
    large = [x for x in arrays if x.size > _SMALL]
    total = jnp.zeros(())
    for x in [*large, *([jnp.concatenate(small)] if small else [])]:
        total += row_sum(x * x).sum()
    return jnp.sqrt(total)
