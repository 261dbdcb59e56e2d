"""Names of a pytree's leaves, the same whether Flax, optax or a plain dict holds them."""

import fnmatch
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
from flax import nnx


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The leaves of a pytree, in its order, with their names.

    Args:
      tree: the pytree.
      is_leaf: argument of `jax.tree.map`, such as `is_variable` for a Flax state.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(leaf_name(path), leaf) for path, leaf in found]


def map_leaves(
    function: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """A pytree with each leaf replaced by `function(name, leaf)`; leaves as in `named_leaves`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf_name(path), leaf), tree, is_leaf=is_leaf
    )


def matching_names(names: Collection[str], globs: Iterable[str], *, key: str) -> set[str]:
    """The names that any of the globs matches; their `*` stands for `/` as well.

    Args:
      names: names of parameters.
      globs: patterns, as of `fnmatch.fnmatchcase`.
      key: the globs' key in a run's config.

    Raises:
      ValueError: a glob matches no name.
    """
    found = {glob: {n for n in names if fnmatch.fnmatchcase(n, glob)} for glob in globs}
    if lost := [glob for glob in found if not found[glob]]:
        raise ValueError(
            f"{key} has {lost}, which match no parameter; the model has {', '.join(names)}"
        )
    return set().union(*found.values())


def is_variable(x: Any) -> bool:
    """Whether something is a Flax variable, whose metadata say more than its array does."""
    return isinstance(x, nnx.Variable)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, such as `groups/layers/0/mlp/router`, given its JAX key path.

    A Flax variable and the array it holds have one name.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
