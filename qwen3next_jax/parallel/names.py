"""Names of a pytree's leaves, the same whether Flax, optax or a plain dict holds them."""

from typing import Any

import jax


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree, in its order, with their names."""
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, such as `groups/layers/0/mlp/router`, given its JAX key path.

    A Flax variable and the array it holds have one name.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
