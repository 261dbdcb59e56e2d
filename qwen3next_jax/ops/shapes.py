"""Checks of what is given to operations and modules, before an error from inside JAX would tell."""

from typing import Any

import jax.numpy as jnp


def check_shape(name: str, x: Any, *axes: int | str) -> None:
    """Refuses what is no array of these axes; a letter stands for any size.

    Raises:
      ValueError: gives the shape, or the type of what has none, and the shape expected.
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
    """Refuses batches without rows and rows of length 0, by a ValueError."""
    if not batch * tokens:
        raise ValueError(f"{batch} rows of {tokens} tokens hold no token; give at least one")


def check_hidden(name: str, x: Any, size: int, **rows: Any) -> None:
    """Refuses what is no hidden states [B, T, size] of at least one token, in floats.

    Args:
      name: of x, for the message.
      x: is checked.
      size: of the last axis.
      rows: further arrays by name; each must be None or [B, T].

    Raises:
      ValueError: says what was given and what was expected.
    """
    check_shape(name, x, "B", "T", size)
    require_tokens(*x.shape[:2])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} is of {x.dtype}; expected floats, such as float32 or bfloat16")
    check_rows(x.shape[:2], **rows)


def check_rows(shape: tuple[int, ...], **rows: Any) -> None:
    """Refuses what is neither None nor of this shape, [B, T], by a ValueError that names it."""
    for name, given in rows.items():
        if given is not None:
            check_shape(name, given, *shape)
