"""Forms for XLA's CPU backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3next_jax.ops.cpu import axis_sum, gather, once, row_max, row_sum, small_products
from qwen3next_jax.ops.platform import COMPILER_OPTIONS, forward_program
from qwen3next_jax.parallel.vocabulary import embed


@pytest.mark.parametrize("size", [1, 31, 64, 96, 4096])
def test_rows_are_reduced_as_by_numpy(size):
    x = np.random.default_rng(0).normal(size=(3, 5, size))
    np.testing.assert_array_equal(row_max(jnp.asarray(x, jnp.float32)), x.astype("f4").max(-1))
    np.testing.assert_allclose(row_sum(jnp.asarray(x, jnp.float32)), x.sum(-1), atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 16, 32, 33])
@pytest.mark.parametrize(
    "spec", ["zij,zjk->zik", "zji,zjk->zik", "zij,zkj->zik", "zij,zrjk->zrik", "zrij,zkj->zrki"]
)
def test_small_matrices_are_multiplied_as_by_einsum(spec, size):
    left, right = spec.split("->")[0].split(",")
    sizes = dict(z=2, r=3, i=size, j=min(size, 5), k=7)
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=[sizes[a] for a in axes]) for axes in (left, right))
    result = jax.jit(lambda x, y: small_products(spec, x, y))(jnp.float32(x), jnp.float32(y))
    np.testing.assert_allclose(result, np.einsum(spec, x, y), atol=1e-5)


@pytest.mark.parametrize("rank", range(4, 10))
def test_small_matrices_are_multiplied_under_vmap_by_programs_without_our_options(rank):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, *[2] * (rank - 4), 3, 8, 8)).astype(np.float32)
    product = functools.partial(small_products, "zij,zjk->zik")
    expected = np.einsum("...ij,...jk->...ik", x, y)
    for _ in range(rank - 4):
        product = jax.vmap(product)
    program = jax.jit(product).lower(x, y).compile()
    assert "ynn_fusion" not in program.as_text()
    np.testing.assert_allclose(program(x, y), expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 2, -1, -2])
def test_an_axis_is_summed_as_by_numpy(axis):
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    np.testing.assert_allclose(axis_sum(jnp.asarray(x), axis), x.sum(axis), atol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda x: axis_sum(x, axis).sum())(x), np.ones_like(x))


def test_small_matrices_are_not_left_to_xla():
    def products(size):
        x = jnp.ones((8, size, size))
        program = jax.jit(lambda x: small_products("zij,zkj->zik", x, x + 1))
        return program.lower(x).compile().as_text().count(" dot(")

    assert products(32) == 0
    assert products(64) == 1


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


def test_a_gather_takes_what_the_index_says_and_so_do_its_derivatives():
    x = jax.random.normal(jax.random.key(0), (6, 3, 4)).astype(jnp.bfloat16)
    index = jnp.array([[5, 0], [2, 2]])

    def take(x, index):
        return x[index, 1]

    np.testing.assert_array_equal(jax.jit(lambda x: gather(take, x, index))(x), take(x, index))

    def squares(compute):
        return lambda x: (compute(x, index).astype(jnp.float32) ** 3).sum()

    for derivative in (jax.grad, jax.hessian):
        got = derivative(squares(functools.partial(gather, take)))(x)
        np.testing.assert_array_equal(got, derivative(squares(take))(x))
        assert got.any()
    many = jax.vmap(functools.partial(gather, take))(jnp.stack([x, -x]), jnp.stack([index] * 2))
    np.testing.assert_array_equal(many, jnp.stack([take(x, index), -take(x, index)]))


def test_a_loop_that_looks_up_tokens_makes_no_copy_of_the_table():
    table = jnp.ones((512, 1024), jnp.bfloat16)

    @jax.jit
    def program(table):
        def add(i, total):
            tokens = (i * i + jnp.arange(4)[None]) % len(table)
            return total + embed(tokens, table, dtype=table.dtype).astype(jnp.float32)

        return jax.lax.fori_loop(0, 64, add, jnp.zeros((1, 4, 1024)))

    assert program.lower(table).compile().memory_analysis().temp_size_in_bytes < table.nbytes / 2


def test_a_forward_program_leaves_products_in_bfloat16_to_the_library():
    def product(x, y):
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    for dtype, library in ((jnp.float32, False), (jnp.bfloat16, True)):
        x = jnp.full((64, 64), 0.5, dtype)
        program = forward_program(product)(x.dtype).lower(x, x).compile()
        assert ("ynn_fusion" in program.as_text()) == library
        np.testing.assert_array_equal(program(x, x), np.full((64, 64), 16))
