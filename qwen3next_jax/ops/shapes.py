"""Shapes: checks of arguments with clearer errors than JAX's own, and padding to whole blocks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array


def check_shape(name: str, x: Any, *axes: int | str) -> None:
    """Checks that x is an array of the given shape.

    Args:
      name: name of x for the error message.
      x: value to check.
      axes: expected size of each axis; a letter stands for any size.

    Raises:
      ValueError: if it is not; states x's shape, or its type if it has no shape, and the expected
        shape.
    """
    shape = getattr(x, "shape", None)
    if (
        shape is None
        or len(shape) != len(axes)
        or any(
            not isinstance(axis, str) and axis != size
            for axis, size in zip(axes, shape, strict=True)
        )
    ):
        given = f"a {type(x).__name__}" if shape is None else f"of shape {list(shape)}"
        raise ValueError(f"{name} is {given}; expected an array [{', '.join(map(str, axes))}]")


def require_tokens(batch: int, tokens: int) -> None:
    """Checks that a batch holds at least one token.

    Raises:
      ValueError: if it has no rows, or rows of length 0.
    """
    if not batch * tokens:
        raise ValueError(f"{batch} rows of {tokens} tokens hold no token; give at least one")


def require_floats(**arrays: Any) -> None:
    """Checks that arrays are of float dtypes.

    Raises:
      ValueError: if one is not; names it.
    """
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} is of {x.dtype}; expected floats, such as float32 or bfloat16"
            )


def refuse_explicit(mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh with explicit axes, on which reshaping an array needs to say how it is split.

    Raises:
      ValueError: it has some, as those of `jax.make_mesh` are; names them.
    """
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    ]
    if explicit:
        raise ValueError(
            f"The mesh's axes {', '.join(explicit)} are explicit; make it by "
            "parallel.mesh.make_mesh, or give jax.make_mesh axis_types=(AxisType.Auto,) * "
            f"{len(mesh.axis_names)}"
        )


def check_hidden(name: str, x: Any, size: int, **rows: Any) -> None:
    """Checks that x is hidden states [B, T, size] of a float dtype with at least one token.

    Args:
      name: name of x for the error message.
      x: value to check.
      size: expected size of the last axis.
      rows: further arrays by name, as `check_rows` takes them.

    Raises:
      ValueError: if x or one of the further arrays does not fit, or x is on a mesh with explicit
        axes.
    """
    check_shape(name, x, "B", "T", size)
    require_tokens(*x.shape[:2])
    require_floats(**{name: x})
    refuse_explicit(jax.typeof(x).sharding.mesh)
    check_rows(x.shape[:2], **rows)


def check_rows(shape: tuple[int, ...], **rows: Any) -> None:
    """Checks that each keyword's value is None or an array of integers of this shape.

    Raises:
      ValueError: if one is not; names it.
    """
    for name, given in rows.items():
        if given is None:
            continue
        check_shape(name, given, *shape)
        if not jnp.issubdtype(given.dtype, jnp.integer):
            raise ValueError(f"{name} is of {given.dtype}; expected integers, such as int32")


def pad_to_multiple(x: Array, size: int, *, axis: int = 1, **options: Any) -> Array:
    """Appends entries along an axis up to a multiple of `size`, by default zeros.

    Args:
      x: array with at least one axis.
      size: at least 1.
      axis: the axis that becomes longer; by default that of tokens in [B, T, ...].
      options: `mode` or `constant_values` of `jnp.pad`.
    """
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, widths, **options)
