"""Starts of documents in packed rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3next_jax.ops.segments import default_positions, document_starts


@pytest.mark.parametrize("first", [False, True])
def test_a_document_starts_where_the_id_changes(first):
    starts = document_starts(jnp.array([[3, 3, 1, 0, 0], [2, 2, 2, 2, 7]]), first=first)
    expected = [[first, False, True, True, False], [first, False, False, False, True]]
    np.testing.assert_array_equal(starts, expected)


def test_positions_restart_in_each_document():
    ids = jnp.array([[3, 3, 1, 0, 0], [2, 2, 2, 2, 7]])
    expected = [[0, 1, 0, 0, 1], [0, 1, 2, 3, 0]]
    np.testing.assert_array_equal(default_positions((2, 5), ids), expected)
    np.testing.assert_array_equal(default_positions((1, 3), None), [[0, 1, 2]])
