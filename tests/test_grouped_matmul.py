"""Grouped matrix products against one product a group, in float64."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import interprets_transposed, quick_jit, relative_error

from qwen3next_jax.ops.grouped_matmul import grouped_matmul, row_alignment

IMPLEMENTATIONS = ["reference", "blocked", "pallas"]
# Groups of no, one and several blocks; the last 64 rows belong to no group.
SIZES = [0, 64, 0, 192, 64, 0]
ROWS, D, F = 384, 6, 5
USED = sum(SIZES)


def make():
    rng = np.random.default_rng(0)
    shapes = (ROWS, D), (len(SIZES), D, F), (ROWS, F)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def group_by_group(rows, weights, d_out):
    out, d_rows, d_weights = np.zeros((ROWS, F)), np.zeros((ROWS, D)), np.zeros(weights.shape)
    start = 0
    for e, size in enumerate(SIZES):
        here = slice(start, start + size)
        x, w, d_y = (a.astype(np.float64) for a in (rows[here], weights[e], d_out[here]))
        out[here], d_rows[here], d_weights[e] = x @ w, d_y @ w.T, x.T @ d_y
        start += size
    return out, d_rows, d_weights


@pytest.mark.parametrize(
    ("implementation", "block"),
    [("reference", 64), ("pallas", 64), *[("blocked", b) for b in (64, 2, 1)]],
)
def test_values_and_gradients_are_those_of_one_product_a_group(implementation, block):
    arrays = make()
    expected = group_by_group(*arrays)
    rows, weights, d_out = (jnp.asarray(x) for x in arrays)
    rows, d_out = rows.at[USED:].set(jnp.nan), d_out.at[USED:].set(jnp.nan)  # of no group
    sizes = jnp.asarray(SIZES)

    @quick_jit
    def run(rows, weights, d_out):
        out, vjp = jax.vjp(
            lambda r, w: grouped_matmul(r, w, sizes, implementation=implementation, block=block),
            rows,
            weights,
        )
        return out, *vjp(d_out)

    # Products of six terms of size 1; a weight's gradient sums over up to 192 rows.
    for got, want in zip(run(rows, weights, d_out), expected, strict=True):
        np.testing.assert_allclose(got[:USED], want[:USED], atol=5e-5)


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=interprets_transposed)])
def test_kernels_for_hopper_gpus_give_the_same(gradients, on_hopper):
    rng = np.random.default_rng(0)
    # Groups of no, one and several blocks, and a block of no group.
    sizes, D, F = [0, 128, 0, 256], 256, 512
    shapes = (512, D), (len(sizes), D, F), (512, F)
    arrays = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes]

    def run(implementation, rows, weights, d_out):
        def product(rows, weights):
            given = dict(implementation=implementation, block=128)
            return grouped_matmul(rows, weights, jnp.asarray(sizes), **given)

        out, vjp = jax.vjp(product, rows, weights)
        of_rows, of_groups = [out], []
        if gradients:
            d_rows, d_weights = vjp(d_out.astype(out.dtype))
            of_rows, of_groups = [out, d_rows], [d_weights]
        return [*(x[: sum(sizes)] for x in of_rows), *of_groups]

    want = run("reference", *(x.astype(jnp.float32) for x in arrays))
    for got, exact in zip(run("hopper", *arrays), want, strict=True):
        # Rounded once, to 8 bits.
        assert relative_error(got, exact) <= 3e-3


@pytest.mark.parametrize("sizes", [[100, 156], [0, 3, 0, 1, 200, 0], [0, 0]])
def test_groups_may_have_any_sizes_by_default(sizes):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((256, D)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((len(sizes), D, F)), jnp.float32)
    used = np.arange(256)[:, None] < sum(sizes)

    def gradients(implementation):
        def total(rows, weights):
            out = grouped_matmul(rows, weights, jnp.asarray(sizes), implementation=implementation)
            return jnp.where(used, jnp.sin(out), 0).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(rows, weights)

    for got, want in zip(*map(jax.tree.leaves, map(gradients, (None, "reference"))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_products_keep_their_dtype(implementation):
    rows, weights, d_out = make()
    rows, weights = jnp.asarray(rows, jnp.bfloat16), jnp.asarray(weights, jnp.bfloat16)
    expected = group_by_group(np.asarray(rows, np.float32), np.asarray(weights, np.float32), d_out)
    out = grouped_matmul(rows, weights, jnp.asarray(SIZES), implementation=implementation, block=64)
    assert out.dtype == jnp.bfloat16
    # One rounding to 8 bits of values up to 10.
    np.testing.assert_allclose(np.asarray(out, np.float32)[:USED], expected[0][:USED], atol=0.05)


def test_the_weights_gradients_of_many_blocks_of_bfloat16_are_summed_in_float32():
    rows, weights = jnp.ones((1024, 4), jnp.bfloat16), jnp.ones((1, 4, 4), jnp.bfloat16)
    given = dict(implementation="blocked", block=2)

    @quick_jit
    @jax.grad
    def gradient(weights):
        out = grouped_matmul(rows, weights, jnp.array([1024]), **given)
        return out.astype(jnp.float32).sum()

    np.testing.assert_array_equal(gradient(weights), 1024)  # in bfloat16, 256 + 1 is 256


@pytest.mark.usefixtures("untyped")
def test_numpys_arrays_will_do():
    rows, weights, d_out = make()
    got = grouped_matmul(rows, weights, np.asarray(SIZES), implementation="blocked", block=64)
    np.testing.assert_allclose(
        got[:USED], group_by_group(rows, weights, d_out)[0][:USED], atol=5e-5
    )


def test_bad_input_is_refused_with_the_values():
    rows, weights, _ = (jnp.asarray(x) for x in make())
    with pytest.raises(ValueError, match="'dense' is unknown; expected 'pallas', 'hopper'"):
        grouped_matmul(rows, weights, jnp.asarray(SIZES), implementation="dense")
    with pytest.raises(ValueError, match="multiple of block=128 rows, got 100"):
        grouped_matmul(rows[:100], weights, jnp.asarray(SIZES), implementation="blocked", block=128)


@pytest.mark.usefixtures("untyped")
def test_sizes_of_groups_are_integers_of_any_dtype():
    rows, weights, _ = (jnp.asarray(x) for x in make())
    want, got = (
        grouped_matmul(rows, weights, jnp.asarray(SIZES, dtype), implementation="blocked", block=64)
        for dtype in (jnp.int32, jnp.uint32)
    )
    np.testing.assert_array_equal(got[:USED], want[:USED])
    with pytest.raises(ValueError, match="group_sizes is of float32; expected integers"):
        grouped_matmul(rows, weights, jnp.asarray(SIZES, jnp.float32))


def test_blocks_grow_with_the_rows_of_a_group(monkeypatch):
    def block(tokens, per_token, groups):
        mean = tokens * per_token / groups
        return row_alignment(mean=mean, most=tokens)

    assert [block(m, 4, 32) for m in (1, 2, 8, 17, 64, 300, 4096)] == [1, 1, 1, 4, 8, 64, 128]
    module = sys.modules[row_alignment.__module__]
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    assert [block(m, 4, 32) for m in (1, 2, 8, 17)] == [1, 2, 2, 4]
    assert [row_alignment(mean=mean, most=10**5) for mean in (300.0, 1000.0, 1024.0)] == [
        128,
        128,
        512,
    ]
    monkeypatch.setattr(module, "is_hopper", lambda: True)
    assert row_alignment(mean=1024.0, most=10**5) == 128
    monkeypatch.setattr(module, "platform", lambda: "tpu")
    assert row_alignment(mean=100.0, most=800) == 1
