"""Where documents start in packed rows, and tokens' positions in them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def document_starts(segment_ids: Int[Array, "B T"], *, first: bool) -> Bool[Array, "B T"]:
    """Marks the tokens whose segment id differs from that of the token before.

    Args:
      segment_ids: documents packed in a row, each a contiguous run of one id.
      first: the result for the first token of each row, which has no token before it.

    Returns:
      True where a new document starts.
    """
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=first)


def default_positions(
    shape: tuple[int, ...], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """0, 1, 2, ... from the start of each document, in rows of `shape` [B, T]."""
    index = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if segment_ids is None:
        return index
    starts = document_starts(segment_ids, first=False)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
