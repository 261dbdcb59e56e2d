"""Forms for XLA's CPU backend."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3next_jax.ops.cpu import (
    axis_sum,
    bfloat16_product,
    gather,
    once,
    product_over_rows,
    row_max,
    row_sum,
    small_products,
)
from qwen3next_jax.ops.expert_mlp import expert_mlp
from qwen3next_jax.ops.platform import compiler_options, forward_program
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

    assert not fused(compiler_options("float32"))
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


def test_products_of_bfloat16_and_of_their_gradients_are_left_to_the_library_as_they_are():
    def loss(x, y):
        return jnp.tanh(bfloat16_product(x, y)).astype(jnp.float32).sum()

    x, y = (jnp.ones(shape, jnp.bfloat16) for shape in ((64, 128), (128, 256)))
    gradient = jax.jit(jax.grad(loss, (0, 1)), compiler_options=compiler_options("bfloat16"))
    text = gradient.lower(x, y).compile().as_text()
    assert factors(text) == [["bf16", "bf16"]] * 3
    assert text.count('"__ynn_fusion"') == 3


def test_so_are_those_of_experts_and_their_gradients():
    rows, (gate_up, down) = jnp.ones((256, 64)), (jnp.ones((2, 2, 64, 32)), jnp.ones((2, 32, 64)))
    sizes = jnp.array([128, 128])

    def loss(arrays):
        rows, *matrices = arrays
        return expert_mlp(rows, jnp.ones(256), *matrices, sizes, block=32).sum()

    arrays = [a.astype(jnp.bfloat16) for a in (rows, gate_up, down)]
    program = jax.jit(jax.grad(loss), compiler_options=compiler_options("bfloat16"))
    found = factors(program.lower(arrays).compile().as_text())
    assert len(found) % 9 == 0  # three forward and six backward, for each length of runs
    assert {*map(tuple, found)} == {("bf16", "bf16")}


def factors(text):
    """The dtypes of the factors of each product in a compiled program."""
    dtypes = dict(re.findall(r"(%\S+) = (\w+)\[", text))
    pairs = re.findall(r" dot\((%\S+), (%\S+)\)", text)
    return [[dtypes[name] for name in pair] for pair in pairs]


def test_sums_are_not_left_to_the_library():
    def called(dtype):
        program = jax.jit(lambda x: x.sum(0), compiler_options=compiler_options(dtype))
        return "ynn_fusion" in program.lower(jnp.ones((256, 256))).compile().as_text()

    assert not called("float32")
    assert not called("bfloat16")


def test_a_product_of_bfloat16_has_the_derivatives_of_a_plain_one():
    x, y, along = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3))
    x, y = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, y))

    def derivatives(product, dtype):
        def cubes(x, y):
            out = product(x.astype(dtype), y.astype(dtype))
            return (out.astype(jnp.float32) ** 3).sum()

        def slope(x, y):
            return sum((g * along).sum() for g in jax.grad(cubes, (0, 1))(x, y))

        backward = jax.grad(slope, (0, 1))(x, y)
        _, forward = jax.jvp(jax.grad(cubes, (0, 1)), (x, y), (along, along))
        return jax.grad(cubes, (0, 1))(x, y), backward, forward

    got = jax.tree.leaves(derivatives(bfloat16_product, jnp.bfloat16))
    expected = jax.tree.leaves(derivatives(jnp.matmul, jnp.float32))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2**-6 * np.abs(b).max())  # some 2⁻⁸ a rounding


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 3), (1, 8), (2, 64, 32)])
def test_a_product_over_rows_is_that_of_the_transpose(shape, dtype):
    x, y = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(2))
    program = jax.jit(product_over_rows, compiler_options=compiler_options(dtype))
    exact = np.asarray(x, np.float64).swapaxes(-1, -2) @ np.asarray(y, np.float64)
    assert program(x, y).dtype == jnp.float32
    np.testing.assert_allclose(program(x, y), exact, atol=1e-4)
    # Transposed at once, which the compiler may take for a product of other factors.
    transpose = jax.jit(lambda x, y: product_over_rows(x, y).swapaxes(-1, -2))
    np.testing.assert_allclose(transpose(x, y), exact.swapaxes(-1, -2), atol=1e-4)


def test_a_forward_program_leaves_products_in_bfloat16_to_the_library():
    def product(x, y):
        return jnp.matmul(x, y, preferred_element_type=jnp.float32)

    for dtype, library in ((jnp.float32, False), (jnp.bfloat16, True)):
        x = jnp.full((64, 64), 0.5, dtype)
        program = forward_program(product)(x.dtype).lower(x, x).compile()
        assert ("ynn_fusion" in program.as_text()) == library
        np.testing.assert_array_equal(program(x, x), np.full((64, 64), 16))
