"""What kernels state they execute, against the products counted in their traced bodies.

A plan adds up what is stated, so a kernel that states too little would look fast. Counted are the
matrix products in a body, each loop as often as it runs, times the grid steps that are not skipped;
a float32 product in several passes of a bfloat16 unit counts them all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.extend.core import jaxprs_in_params
from oracles import abstract_model, small_config

from qwen3next_jax.model import gated_attention
from qwen3next_jax.ops import attention, causal_conv, gated_delta_rule, grouped_matmul
from qwen3next_jax.ops.attention import causal_pairs, init_carry
from qwen3next_jax.ops.pallas import attention_blocks
from qwen3next_jax.ops.pallas.expert_mlp import TILE, expert_mlp
from qwen3next_jax.ops.pallas.kernel_costs import stating

PASSES = {None: 1, "DEFAULT": 1, "HIGH": 3, "HIGHEST": 6}  # of float32 factors


def kernels(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from kernels(inner)


def kernels_of(function, *args):
    return list(kernels(jax.make_jaxpr(function)(*args).jaxpr))


def product_flops(jaxpr, *, runs_of_while=None):
    """Of one run of a kernel's body that takes the branches with most products.

    Without `runs_of_while`, how often each body of a `while` runs, there must be none.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval
            precision = eqn.params["precision"]
            name = precision[0].name if precision else None
            passes = PASSES[name] if left.dtype == jnp.float32 else 1
            depth = np.prod([left.shape[axis] for axis in contracted])
            total += 2 * passes * depth * np.prod(eqn.outvars[0].aval.shape)
        else:
            inner = [
                product_flops(x, runs_of_while=runs_of_while) for x in jaxprs_in_params(eqn.params)
            ]
            times = {"scan": eqn.params.get("length"), "while": runs_of_while}.get(
                eqn.primitive.name, 1
            )
            assert times is not None, "runs who knows how often"
            total += times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return int(total)


def stated(eqn):
    return eqn.params["cost_estimate"].flops


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def traced_layer(remat, implementation, monkeypatch):
    """Forward and back through a layer of attention without experts, over 128 tokens."""

    def attend(*args, **options):
        return attention(*args, **options | {"implementation": implementation})

    monkeypatch.setattr(gated_attention, "attention", attend)
    config = small_config(
        num_hidden_layers=1, layer_types=("full_attention",), num_experts=0, intermediate_size=64
    )
    graph, params = nnx.split(abstract_model(config, remat=remat))

    def loss(params, tokens):
        return nnx.merge(graph, params).hidden_states(tokens)[0].sum()

    return jax.make_jaxpr(jax.grad(loss))(params, array(1, 128, dtype=jnp.int32)).jaxpr


@pytest.mark.parametrize(("remat", "times"), [("layer", 4), ("layer_but_attention", 3)])
def test_a_layer_computed_again_runs_attention_s_kernel_again_only_if_told_to(
    remat, times, monkeypatch
):
    found = list(kernels(traced_layer(remat, "pallas", monkeypatch)))
    assert len(found) == times  # forward, perhaps again, keys and values, queries


def test_a_layer_computed_again_multiplies_scores_again_only_if_told_to(monkeypatch):
    # 128 tokens are one block, whose loop over key blocks runs once.
    again, kept = (
        product_flops(traced_layer(remat, "chunked", monkeypatch), runs_of_while=1)
        for remat in ("layer", "layer_but_attention")
    )
    c = small_config()
    assert again - kept == 2 * 2 * 128**2 * c.num_attention_heads * c.head_dim


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("tokens", [4096, 100])
def test_delta_rule(tokens, dtype):
    B, K, N, H = 2, 16, 32, 128

    def loss(q, k, v, g, beta):
        out, state = gated_delta_rule(q, k, v, log_decay=g, beta=beta, implementation="pallas")
        return out.sum().astype(jnp.float32) + state.sum()

    keys, values = array(B, tokens, K, H, dtype=dtype), array(B, tokens, N, H, dtype=dtype)
    gates = array(B, tokens, N, dtype=jnp.float32)
    found = kernels_of(jax.grad(loss, argnums=range(5)), keys, keys, values, gates, gates)
    assert len(found) == 2
    for kernel in found:
        steps = np.prod(kernel.params["grid_mapping"].grid)
        assert stated(kernel) == steps * product_flops(kernel.params["jaxpr"])
        arrays = kernel.invars + kernel.outvars
        moved = sum(x.aval.size * x.aval.dtype.itemsize for x in arrays)
        assert kernel.params["cost_estimate"].bytes_accessed == moved


def test_causal_conv():
    B, T, N, H, W = 2, 4096, 32, 128, 4

    def loss(x, kernel):
        y = causal_conv(x, kernel, activation="silu", implementation="pallas")
        return y.sum().astype(jnp.float32)

    found = kernels_of(
        jax.grad(loss, argnums=(0, 1)), array(B, T, N, H), array(W, N, H, dtype=jnp.float32)
    )
    # A multiply and an add for each tap; backward again, and for both gradients.
    assert [stated(kernel) for kernel in found] == [2 * W * B * T * N * H * n for n in (1, 3)]
    for kernel, passes in zip(found, (2, 3), strict=True):
        own = B * T * 128 * 4
        moved = kernel.params["cost_estimate"].bytes_accessed
        assert moved == passes * B * T * N * H * 2 + own


@pytest.mark.parametrize("tokens", [4096, 700])
def test_attention(tokens):
    B, N, K, H, block = 2, 16, 2, 256, 512

    def loss(q, k, v, segments):
        out = attention(q, k, v, segment_ids=segments, implementation="pallas")
        return out.sum().astype(jnp.float32)

    arrays = [array(B, tokens, heads, H) for heads in (N, K, K)]
    segments = array(B, tokens, dtype=jnp.int32)
    found = kernels_of(jax.grad(loss, argnums=range(3)), *arrays, segments)
    assert len(found) == 3  # forward, keys and values, queries
    # Pairs of blocks in which any query may look at any key; the others are skipped.
    length = -(-tokens // block) * block
    causal = np.tril(np.ones((length, length), bool))
    seen = causal.reshape(length // block, block, -1, block).any((1, 3)).sum()
    for kernel in found:
        assert stated(kernel) == B * N * seen * product_flops(kernel.params["jaxpr"])
    assert [stated(k) / stated(found[0]) for k in found] == [1, 2, 1.5]  # 2, 4, 3 products


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_attention_between_blocks(dtype):
    Z, B, K, R, C, H, P = 3, 2, 2, 8, 512, 256, 128
    q, out = array(Z, B, K, R, C, H, dtype=dtype), array(Z, B, K, R, C, P, dtype=dtype)
    k, v = array(Z, B, K, C, H, dtype=dtype), array(Z, B, K, C, P, dtype=dtype)
    numbers, ids = array(Z, B, K, R, C, dtype=jnp.float32), array(Z, B, C, dtype=jnp.int32)
    pairs = causal_pairs(Z)

    def forward(q, k, v, ids):
        return attention_blocks.accumulate(init_carry(q, v), q, k, v, ids, ids, pairs, causal=True)

    def backward(q, k, v, ids, numbers, out):
        return attention_blocks.accumulate_gradients(
            jnp.zeros(q.shape), q, k, v, ids, ids, numbers, numbers, out, pairs, causal=True
        )

    found = kernels_of(forward, q, k, v, ids) + kernels_of(backward, q, k, v, ids, numbers, out)
    assert len(found) == 3  # forward, queries, keys and values
    for kernel in found:
        steps = np.prod(kernel.params["grid_mapping"].grid)
        assert steps == B * K * R * Z * (Z + 1) // 2
        assert stated(kernel) == steps * product_flops(kernel.params["jaxpr"])


@pytest.mark.parametrize("sizes", [(1024, 512, 0, 2560), (900, 700, 1000, 1496), (10, 20, 30, 40)])
def test_grouped_products(sizes):
    R, E, D, F, rows = 4096, 4, 2048, 1024, 512  # of a tile

    def loss(x, w):
        y = grouped_matmul(x, w, jnp.asarray(sizes), implementation="pallas")
        return y.sum().astype(jnp.float32)

    found = kernels_of(jax.grad(loss, argnums=(0, 1)), array(R, D), array(E, D, F))
    assert len(found) == 3  # forward, gradients of the rows and of the weights
    ends = np.cumsum(sizes)
    tiles = sum(-(-e // rows) - (e - n) // rows for e, n in zip(ends, sizes, strict=True) if n)
    for kernel in found:
        # The grid's middle axis is as long as the groups need: its steps each take a tile of rows.
        body = product_flops(kernel.params["jaxpr"])
        executed = body * tiles * (2 * R * D * F // (R // rows * body))
        # Stated is the whole buffer: exact where groups fill it with whole tiles. A boundary inside
        # a tile executes it once more; rows of no group are stated, but skipped.
        assert stated(kernel) == 2 * R * D * F
        assert executed <= stated(kernel) + (E - 1) * stated(kernel) // (R // rows)
        if sum(sizes) == R and not any(n % rows for n in sizes):
            assert executed == stated(kernel)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("free", "products"), [(4, 8), (2, 5)])  # the latter: frozen matrices
def test_experts(dtype, free, products):
    # Tiles that experts share are executed once for each; rows that are not expected never are.
    R, expected, D, F, sizes = 1280, 1024, 256, 128, (300, 200, 300, 224)

    def loss(x, weights, gate_up, down):
        y = expert_mlp(x, weights, gate_up, down, jnp.asarray(sizes), expected)
        return y.sum().astype(jnp.float32)

    E = len(sizes)
    matrices = array(E, 2, D, F, dtype=dtype), array(E, F, D, dtype=dtype)
    given = array(R, D, dtype=dtype), array(R, dtype=jnp.float32), *matrices
    forward, backward = found = kernels_of(jax.grad(loss, argnums=range(free)), *given)
    assert 3 * stated(backward) == products * stated(forward)
    ends = np.cumsum(sizes)
    tiles = sum(-(-e // TILE) - (e - n) // TILE for e, n in zip(ends, sizes, strict=True))
    assert tiles == expected // TILE + E - 1
    for kernel in found:
        assert stated(kernel) == tiles * product_flops(kernel.params["jaxpr"])


def test_costs_are_stated_of_as_many_kernels_as_are_called():
    def double(x):
        def kernel(x_ref, out_ref):
            out_ref[...] = 2 * x_ref[...]

        return pl.pallas_call(kernel, out_shape=x, interpret=True)(x)

    cost = pl.CostEstimate(flops=8, transcendentals=0, bytes_accessed=64)
    x = jnp.arange(8.0)
    twice = stating(jax.jit(lambda x: {"y": double(double(x))}), [cost, cost])
    assert jnp.array_equal(twice(x)["y"], 4 * x)
    assert [stated(k) for k in kernels_of(twice, x)] == [8, 8]
    for costs in ([cost], [cost] * 3):
        with pytest.raises(ValueError, match="kernels"):
            stating(lambda x: double(double(x)), costs)(x)
