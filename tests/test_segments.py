"""Starts of documents in packed rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3next_jax.ops.segments import document_starts


@pytest.mark.parametrize("first", [False, True])
def test_a_document_starts_where_the_id_changes(first):
    starts = document_starts(jnp.array([[3, 3, 1, 0, 0], [2, 2, 2, 2, 7]]), first=first)
    expected = [[first, False, True, True, False], [first, False, False, False, True]]
    np.testing.assert_array_equal(starts, expected)
