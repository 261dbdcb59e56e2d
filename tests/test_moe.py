"""The mixture of experts against a plain loop over tokens, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import quick_jit, random_module, small_config

from qwen3next_jax.model.moe import SparseMoE


def build(config):
    """A layer with random weights, and these as float64 by name."""
    layer = random_module(nnx.eval_shape(lambda: SparseMoE(config, rngs=nnx.Rngs(0))), scale=0.5)
    flat = nnx.to_flat_state(nnx.state(layer))
    return layer, {"/".join(map(str, path)): np.float64(p[...]) for path, p in flat}


def silu(x):
    return x / (1 + np.exp(-x))


def token_by_token(x, w, config):
    out, chosen, probabilities, log_norms = [], [], [], []
    for token in x.reshape(-1, x.shape[-1]):
        logits = token @ w["router"]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        best = np.argsort(-p)[: config.num_experts_per_tok]
        share = p[best] / (p[best].sum() if config.norm_topk_prob else 1)
        y = 0
        for e, weight in zip(best, share, strict=True):
            gate, up = token @ w["gate_up_proj"][e, 0], token @ w["gate_up_proj"][e, 1]
            y = y + weight * (silu(gate) * up) @ w["down_proj"][e]
        if config.shared_expert_intermediate_size:
            shared = {k.split("/")[1]: v for k, v in w.items() if k.startswith("shared_expert/")}
            hidden = silu(token @ shared["gate_proj"]) * (token @ shared["up_proj"])
            y = y + hidden @ shared["down_proj"] / (1 + np.exp(-token @ w["shared_expert_gate"]))
        out.append(y)
        chosen.append(np.bincount(best, minlength=len(p)))
        probabilities.append(p)
        log_norms.append(np.log(np.exp(logits).sum()))
    B, T, _ = x.shape
    return [np.reshape(a, (B, T, *np.shape(a[0]))) for a in (out, chosen, probabilities, log_norms)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 7},
        {"shared_expert_intermediate_size": 0},
    ],
    ids=["plain", "not normalised", "every expert", "none shared"],
)
def test_outputs_are_those_of_a_loop_over_tokens(changes):
    config = small_config(**changes)
    layer, weights = build(config)
    x = np.random.default_rng(1).standard_normal((2, 11, config.hidden_size))
    want = token_by_token(x, weights, config)[0]
    got = quick_jit(layer)(jnp.asarray(x, jnp.float32))
    # Values up to 100 in float32, through two products of 32 terms.
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_statistics_count_each_row_without_its_padding():
    config = small_config()
    layer, weights = build(config)
    x = np.random.default_rng(1).standard_normal((2, 11, config.hidden_size))
    segments = np.array([[1] * 4 + [2] * 3 + [0] * 4, [1] * 11], np.int32)
    with_stats = quick_jit(lambda x, ids: layer.with_stats(x, segment_ids=ids))
    out, stats = with_stats(jnp.asarray(x, jnp.float32), jnp.asarray(segments))
    _, chosen, probabilities, log_norms = token_by_token(x, weights, config)
    real = segments > 0
    np.testing.assert_array_equal(stats.counts, (chosen * real[..., None]).sum(1))
    np.testing.assert_array_equal(stats.tokens, [7, 11])
    # Sums of a dozen float32 numbers.
    np.testing.assert_allclose(
        stats.probabilities, (probabilities * real[..., None]).sum(1), atol=1e-5
    )
    np.testing.assert_allclose(stats.squared_lse, (log_norms**2 * real).sum(1), rtol=1e-5)
    entropies = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(stats.entropies, (entropies * real).sum(1), rtol=1e-5)
    # Padding is routed like any token: it is only not counted.
    unpadded = with_stats(jnp.asarray(x, jnp.float32), jnp.ones((2, 11), jnp.int32))
    np.testing.assert_array_equal(out, unpadded[0])


def test_the_routers_and_the_gates_products_are_float32_whatever_others_are():
    layer, _ = build(small_config())
    graph, params = nnx.split(layer)
    x = jnp.zeros((1, 4, layer.config.hidden_size), jnp.bfloat16)

    def loss(params, x):
        y, stats = nnx.merge(graph, params).with_stats(x)
        return y.astype(jnp.float32).sum() + stats.squared_lse.sum()

    with jax.default_matmul_precision("default"):
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    exact = [line for line in products if line.split(" : ")[-1].count("bf16") == 0]
    assert len(exact) == 6  # router and gate, forward, and for both their factors' gradients
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in exact)


def test_router_rows_start_with_equal_norms_unless_told_otherwise():
    def norms(**changes):
        config = small_config(num_experts=64, **changes)
        router = quick_jit(lambda: SparseMoE(config, rngs=nnx.Rngs(0)).router[...])()
        assert abs(router.std() / 0.02 - 1) < 0.1
        return np.linalg.norm(router, axis=0)

    np.testing.assert_allclose(norms(), 0.02 * 32**0.5, rtol=1e-5)
    # Norms of 32 normal numbers scatter by about 1 / √64.
    assert np.ptp(norms(router_init="normal")) > 0.2 * 0.02 * 32**0.5


@pytest.mark.usefixtures("untyped")
def test_numpys_arrays_will_do():
    config = small_config()
    layer, weights = build(config)
    x = np.random.default_rng(0).standard_normal((1, 5, 32)).astype(np.float32)
    want = token_by_token(np.float64(x), weights, config)[0]
    # Not in `jit`, which makes them JAX's. The tolerance is that above.
    np.testing.assert_allclose(layer(x), want, atol=1e-5 * np.abs(want).max())


def test_rows_without_tokens_are_refused():
    layer = nnx.eval_shape(lambda: SparseMoE(small_config(), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="0 tokens hold no token"):
        layer(jnp.zeros((2, 0, 32)))
