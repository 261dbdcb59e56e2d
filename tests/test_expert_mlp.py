"""The experts' feed-forward, kernels interpreted, against one dense feed-forward an expert."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import quick_jit, random_module, relative_error, small_config

from qwen3next_jax.model import moe
from qwen3next_jax.ops import expert_mlp as op
from qwen3next_jax.ops.expert_mlp import expert_mlp
from qwen3next_jax.ops.pallas.expert_mlp import TILE, can_compile

D, F = 256, 128
# Tiles met by several experts, experts of several tiles, experts of none at both ends and between.
SIZES = [0, 300, 5, 7, 0, 500, 0]


def reference(rows, weights, gate_up, down, sizes):
    outs, start = [], 0
    for e, size in enumerate(sizes):
        x, w = rows[start : start + size], weights[start : start + size]
        gate, up = x @ gate_up[e, 0], x @ gate_up[e, 1]
        outs.append((jax.nn.silu(gate) * up * w[:, None]) @ down[e])
        start += size
    return jnp.concatenate(outs)


def with_gradients(function):
    def run(args, d_out):
        out, vjp = jax.vjp(function, *args)
        return out, *vjp(d_out)

    return quick_jit(run)


def make(sizes, rows, dtype):
    rng = np.random.default_rng(0)

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    weights = jnp.asarray(rng.uniform(0.1, 1, rows), jnp.float32)
    matrices = draw(len(sizes), 2, D, F, scale=D**-0.5), draw(len(sizes), F, D, scale=F**-0.5)
    return draw(rows, D), weights, *matrices, draw(rows, D)


@pytest.mark.parametrize(
    ("implementation", "sizes", "rows", "dtype", "block"),
    [
        ("pallas", SIZES, 1000, "float32", 128),  # rows behind the last expert's
        ("pallas", SIZES, 812, "bfloat16", 128),
        ("pallas", [TILE, 2 * TILE], 3 * TILE, "float32", 128),
        ("pallas", [3, 0, 4], 9, "float32", 128),  # less than a tile
        ("blocked", [0, 384, 128, 0, 640, 256, 0], 2048, "float32", 128),  # 3, 1, 5 and 2 blocks
        ("blocked", [128, 256], 384, "bfloat16", 128),
        ("blocked", [0, 64, 128, 0], 256, "float32", 64),
        ("blocked", [4, 0, 2], 8, "float32", 2),
        ("blocked", [1, 0, 2], 5, "float32", 1),
        ("blocked", [128, 0, 1024], 9 * 128, "float32", 128),  # 1 and 8 blocks
        ("blocked", [16, 144, 96], 16 * 16, "float32", 16),  # 1, 9 and 6, in runs of up to 5
        ("products", [0, 64, 128, 0], 256, "float32", 64),
        ("products", [0, 64, 128, 0], 256, "bfloat16", 64),
    ],
)
def test_values_and_gradients_are_those_of_each_experts_own_mlp(
    implementation, sizes, rows, dtype, block
):
    *args, d_out = make(sizes, rows, dtype)
    used = sum(sizes)
    # Rows behind the last expert's may hold anything that products by 0 leave finite.
    rest = jnp.nan if implementation == "pallas" else 1e3
    poisoned = [np.array(a) for a in (*args[:2], d_out)]
    for a in poisoned:
        a[used:] = rest

    def ours(*args):
        given = dict(implementation=implementation, block=block)
        return expert_mlp(*args, jnp.asarray(sizes), **given)

    got = with_gradients(ours)((*poisoned[:2], *args[2:]), poisoned[2])
    exact = [np.asarray(a, np.float32) for a in (*args, d_out[:used])]
    want = with_gradients(lambda *args: reference(*args, sizes))(exact[:-1], exact[-1])
    # Products of up to 500 numbers of size 1, in float32; in bfloat16 with 8 bits at each step.
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for name, a, b in zip(("y", "rows", "weights", "gate_up", "down"), got, want, strict=True):
        if name in ("y", "rows", "weights"):
            a, b = a[:used], b[:used]
        error = relative_error(a, b)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(
    ("implementation", "sizes", "rows"),
    [
        ("pallas", SIZES, 1000),
        ("blocked", [0, 384, 128, 0], 512),
        ("products", [0, 64, 128, 0], 256),
    ],
)
@pytest.mark.parametrize("frozen", ["both", "gate_up", "down"])
def test_what_is_not_frozen_has_the_same_gradients_if_matrices_are(
    implementation, sizes, rows, frozen
):
    *args, d_out = make(sizes, rows, "float32")

    def ours(*args):
        given = dict(
            implementation=implementation, block=128 if implementation == "blocked" else 64
        )
        return expert_mlp(*args, jnp.asarray(sizes), **given)

    free = {"both": [0, 1], "gate_up": [0, 1, 3], "down": [0, 1, 2]}[frozen]

    def of_free(*given):
        return ours(*(given[free.index(i)] if i in free else x for i, x in enumerate(args)))

    out, *want = with_gradients(ours)(args, d_out)
    got = with_gradients(of_free)([args[i] for i in free], d_out)
    for a, b in zip(got, [out, *(want[i] for i in free)], strict=True):
        used = sum(sizes) if len(a) == rows else None
        # The same products; XLA may sum some in another order.
        assert relative_error(a[:used], b[:used]) < 1e-6


def test_the_matrices_gradients_of_many_blocks_of_bfloat16_are_summed_in_float32():
    matrices = jnp.ones((1, 2, 4, 4), jnp.bfloat16), jnp.ones((1, 4, 4), jnp.bfloat16)

    def gradients(rows):
        def total(*matrices):
            args = jnp.ones((rows, 4), jnp.bfloat16), jnp.ones(rows), *matrices
            given = dict(implementation="blocked", block=2)
            return expert_mlp(*args, jnp.array([rows]), **given).astype(jnp.float32).sum()

        return quick_jit(jax.grad(total, argnums=(0, 1)))(*matrices)

    for many, of_one_block in zip(gradients(1024), gradients(2), strict=True):
        # The gradient of one block is rounded to 8 bits, and so is the sum of 512 of them.
        want = 512 * of_one_block.astype(jnp.float32)
        assert relative_error(many.astype(jnp.float32), want) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [D, D - 4])  # multiples of eight, and of four only
def test_rows_by_themselves_read_their_experts_matrices_where_they_lie(size, dtype):
    sizes = [0, 2, 1, 0, 3, 0]
    rows, weights, gate_up, down, _ = make(sizes, 9, dtype)
    rows, gate_up, down = rows[:, :size], gate_up[:, :, :size], down[..., :size]
    rows = rows.at[sum(sizes) :].set(1e3)
    program = jax.jit(lambda *args: expert_mlp(*args, jnp.asarray(sizes), block=1))
    got = program(rows, weights, gate_up, down)[: sum(sizes)]
    exact = [np.asarray(a, np.float32) for a in (rows, weights, gate_up, down)]
    want = quick_jit(lambda *args: reference(*args, sizes))(*exact)
    assert got.dtype == dtype
    # Sums of up to 256 numbers of size 1; in bfloat16 what lies between the products has 8 bits.
    assert relative_error(got, want) < (1e-5 if dtype == "float32" else 2e-2)
    # Instead of nine rows' matrices there are sums of every eight of their entries, or every four.
    memory = program.lower(rows, weights, gate_up, down).compile().memory_analysis()
    assert memory.temp_size_in_bytes < len(rows) * gate_up[0].nbytes


@pytest.mark.parametrize("block", [1, 16])
def test_a_loop_over_tokens_in_bfloat16_keeps_no_other_copy_of_the_matrices(block):
    sizes = [block, 0] * 8
    rows, weights, gate_up, down, _ = make(sizes, sum(sizes), "bfloat16")

    @jax.jit
    def program(rows, weights, gate_up, down):
        def step(i, rows):
            now = jnp.roll(jnp.asarray(sizes), i)
            return expert_mlp(rows, weights, gate_up, down, now, block=block)

        return jax.lax.fori_loop(0, 4, step, rows)

    memory = program.lower(rows, weights, gate_up, down).compile().memory_analysis()
    # Sums of every eight entries in float32, or copies of one expert's matrices.
    assert memory.temp_size_in_bytes < 0.5 * (gate_up.nbytes + down.nbytes)


def test_rows_in_bfloat16_are_converted_once_and_not_in_each_visit():
    sizes = [16, 0, 16, 48]
    rows, weights, gate_up, down, _ = make(sizes, sum(sizes), "bfloat16")
    program = jax.jit(lambda *args: expert_mlp(*args, block=16))
    args = rows, weights, gate_up, down, jnp.asarray(sizes)
    text = program.lower(*args).compile().as_text()
    assert len(re.findall(rf"\[{sum(sizes)},{D}\]\S* convert\(", text)) == 2  # to float32 and back


def test_what_gradients_keep_of_bfloat16_rows_is_bfloat16():
    sizes = [16, 0, 32]
    rows, weights, gate_up, down, _ = make(sizes, sum(sizes), "bfloat16")

    def program(rows):
        given = dict(implementation="blocked", block=16)
        return expert_mlp(rows, weights, gate_up, down, jnp.asarray(sizes), **given)

    _, pull = jax.vjp(program, rows)
    kept = [x.dtype for x in jax.tree.leaves(pull) if x.shape == (sum(sizes), F)]
    assert kept == 2 * [jnp.bfloat16]  # gates and ups


def sparse_layer(config):
    return random_module(nnx.eval_shape(lambda: moe.SparseMoE(config, rngs=nnx.Rngs(0))))


def test_a_sparse_layer_by_them_is_the_one_by_grouped_products(monkeypatch):
    config = small_config(hidden_size=D, moe_intermediate_size=F)
    graph, params = nnx.split(sparse_layer(config))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, D)), jnp.float32)

    def run(params, x):
        y, vjp = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
        return y, vjp(jnp.cos(y))

    want = quick_jit(run)(params, x)
    monkeypatch.setattr(moe, "row_alignment", lambda **_: 1)
    monkeypatch.setattr(op, "default_implementation", lambda *_: "pallas")
    monkeypatch.setattr(op, "grouped_matmul", None)  # not called
    got = quick_jit(lambda *args: run(*args))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Sums of up to 256 float32 products in another order.
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(np.abs(b).max())))


@pytest.mark.parametrize("tokens", [3, 50, 700])  # a visit of few blocks, of 32, and several
def test_a_sparse_layer_on_a_gpu_is_the_one_on_a_cpu(tokens, monkeypatch):
    config = small_config()
    graph, params = nnx.split(sparse_layer(config))
    shape = (2, tokens, config.hidden_size)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)

    def run(params, x):
        y, vjp = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
        return y, vjp(jnp.cos(y))

    want = quick_jit(run)(params, x)
    for module in ("model.moe", "ops.expert_mlp", "ops.grouped_matmul", "parallel.expert"):
        monkeypatch.setattr(sys.modules[f"qwen3next_jax.{module}"], "platform", lambda: "gpu")
    got = quick_jit(lambda *args: run(*args))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # A weight's gradient sums float32 products of up to 1400 tokens, in another order.
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(np.abs(b).max())))


def test_bad_input_is_refused_with_the_values():
    *args, _ = make([4, 4], 8, "float32")
    with pytest.raises(ValueError, match="'dense' is unknown; expected 'pallas', 'blocked' or"):
        expert_mlp(*args, jnp.asarray([4, 4]), implementation="dense")
    with pytest.raises(ValueError, match="multiple of block=3 rows, got 8"):
        expert_mlp(*args, jnp.asarray([4, 4]), implementation="blocked", block=3)


def test_experts_that_a_tpu_cannot_take_are_known_before_it_tries():
    bfloat16 = jnp.dtype("bfloat16")
    assert can_compile(2048, 512, bfloat16)
    assert not can_compile(2048, 500, bfloat16)  # not whole vectors
    assert not can_compile(8192, 2048, bfloat16)  # 100 MB of matrices
    # The compiler was seen to refuse these on a v5p, with 73 and 95 MB of 64.
    assert not can_compile(2048, 768, bfloat16)
    assert not can_compile(2048, 384, jnp.dtype("float32"))
