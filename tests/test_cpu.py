"""Forms for XLA's CPU backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3next_jax.ops.cpu import once, row_max, row_sum
from qwen3next_jax.ops.platform import COMPILER_OPTIONS


@pytest.mark.parametrize("size", [1, 31, 64, 96, 4096])
def test_rows_are_reduced_as_by_numpy(size):
    x = np.random.default_rng(0).normal(size=(3, 5, size))
    np.testing.assert_array_equal(row_max(jnp.asarray(x, jnp.float32)), x.astype("f4").max(-1))
    np.testing.assert_allclose(row_sum(jnp.asarray(x, jnp.float32)), x.sum(-1), atol=1e-4)


@pytest.mark.parametrize("sign", [-1, 0, 1, np.nan])
def test_whichever_branch_is_taken_the_value_is_the_functions(sign):
    x = jnp.arange(1.0, 7).reshape(2, 3) * sign
    np.testing.assert_array_equal(jax.jit(lambda x: once(jnp.exp, x))(x), jax.jit(jnp.exp)(x))
    np.testing.assert_array_equal(jax.vmap(lambda x: once(jnp.exp, x))(x), jax.jit(jnp.exp)(x))
    assert once(jnp.exp, x[:, :0]).shape == (2, 0)


def test_xla_computes_it_in_one_place():
    def readers(x, compute):
        y = compute(lambda x: x * 3 + x * x, x)
        return y[1:] * y[:-1], y[::2] + 1

    def conditionals(compute):
        text = jax.jit(lambda x: readers(x, compute)).lower(jnp.ones(4096)).compile().as_text()
        return text.count(" conditional(")

    assert conditionals(once) == 1
    assert conditionals(lambda function, x: function(x)) == 0


def test_programs_of_many_tokens_leave_products_to_xla():
    def fused(options):
        program = jax.jit(lambda x: x @ x, compiler_options=options)
        return "ynn_fusion" in program.lower(jnp.ones((256, 256))).compile().as_text()

    assert not fused(COMPILER_OPTIONS)
    assert fused(None), "XLA's default has changed: measure again whether the option is of use"
