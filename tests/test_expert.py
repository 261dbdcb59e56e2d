"""Dispatch and combine with stand-ins for the experts, against a sum over all experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3next_jax.parallel.expert import apply_experts

E, D = 6, 5
# Of each token its experts; experts 2 and 5 get no token, expert 0 gets every one.
EXPERTS = np.array([[0, 1], [0, 3], [4, 0], [0, 1], [3, 0], [0, 4], [1, 0]], np.int32)


def make(experts=EXPERTS):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(experts), D)).astype(np.float32)
    weights = rng.uniform(0.1, 1, experts.shape).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(weights)


def expert_of(rows, group_sizes):
    """Which expert each row belongs to; rows beyond the last belong to the last."""
    return jnp.minimum(
        jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(rows)), side="right"), E - 1
    )


@pytest.mark.parametrize("alignment", [1, 64])
def test_identity_experts_give_each_token_back_times_its_weights(alignment):
    x, weights = make()
    y = apply_experts(
        x, jnp.asarray(EXPERTS), weights, lambda rows, sizes: rows,
        num_experts=E, alignment=alignment,
    )  # fmt: skip
    np.testing.assert_allclose(y, x * weights.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("alignment", [1, 64])
@pytest.mark.parametrize(
    "experts", [EXPERTS, EXPERTS[:1], np.full((9, 1), 5, np.int32)], ids=["some", "one", "last"]
)
def test_values_and_gradients_are_those_of_all_experts_on_all_tokens(experts, alignment):
    x, weights = make(experts)
    # Expert e multiplies by its own matrix, with a tanh so that gradients depend on the values.
    matrices = jnp.asarray(np.random.default_rng(1).standard_normal((E, D, D)), jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape), jnp.float32)

    def dispatched(x, weights, matrices):
        def compute(rows, sizes):
            return jnp.tanh(jnp.einsum("rd,rdf->rf", rows, matrices[expert_of(rows, sizes)]))

        return apply_experts(
            x, jnp.asarray(experts), weights, compute, num_experts=E, alignment=alignment
        )

    def dense(x, weights, matrices):
        every = jnp.tanh(jnp.einsum("md,edf->mef", x, matrices))
        share = (weights[..., None] * jax.nn.one_hot(experts, E)).sum(1)
        return jnp.einsum("mef,me->mf", every, share)

    results = []
    for function in (dispatched, dense):
        y, vjp = jax.vjp(jax.jit(function), x, weights, matrices)
        results.append((y, *vjp(cotangent)))
    # Sums of a few float32 products of size 1.
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("alignment", [1, 64])
def test_rows_come_sorted_by_expert_in_aligned_groups_with_zeros_between(alignment):
    x, weights = make()
    seen = []
    apply_experts(
        x, jnp.asarray(EXPERTS), weights, lambda *given: seen.append(given) or given[0],
        num_experts=E, alignment=alignment,
    )  # fmt: skip
    ((rows, sizes),) = seen
    counts = np.bincount(EXPERTS.ravel(), minlength=E)
    np.testing.assert_array_equal(sizes, -(-counts // alignment) * alignment)
    assert len(rows) % alignment == 0
    start = 0
    for e in range(E):
        mine = np.asarray(x)[(e == EXPERTS).any(1)]
        np.testing.assert_array_equal(rows[start : start + counts[e]], mine)
        assert not rows[start + counts[e] : start + sizes[e]].any()
        start += sizes[e]
    assert not rows[start:].any()
