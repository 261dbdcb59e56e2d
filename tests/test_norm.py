"""The norm of many arrays, small and large, against numpy's."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3next_jax.training.norm import norm


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        [()],
        [(3,), (2, 5, 7), (0, 4)],
        [(3, 300, 100)],  # one that is summed by itself, its rows of a length that halves once
        [(7,), (130, 1031), (2, 40_000), (4,)],
        [(256, 256), (65_537,), (65_535,)],  # about the size from which arrays are large
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_is_that_of_all_entries(shapes, dtype):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    expected = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in arrays))
    got = jax.jit(norm)(arrays)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("entry", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(5,), (512, 256)])
def test_what_is_not_finite_shows(entry, shape):
    x = jnp.ones(shape).at[..., -1].set(entry)
    assert not np.isfinite(norm([jnp.ones(3), x]))


def test_off_the_cpu_the_norm_is_that_of_all_entries_too(monkeypatch):
    monkeypatch.setattr(sys.modules[norm.__module__], "platform", lambda: "gpu")
    assert norm([jnp.array([3.0]), jnp.array([4.0])]) == 5
