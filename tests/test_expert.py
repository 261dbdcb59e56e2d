"""Dispatch and combine with stand-ins for the experts, against a sum over all experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launched import TESTS, run_python

from qwen3next_jax.parallel import expert
from qwen3next_jax.parallel.expert import _cumsum, _order, _plan, _route, apply_experts

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


@pytest.mark.parametrize("num_experts", [E, 2**30], ids=["one integer", "two arrays"])
def test_assignments_are_sorted_by_expert_and_stay_in_order(num_experts):
    flat = EXPERTS.reshape(-1)
    order = _order(jnp.asarray(flat), num_experts)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))


@pytest.mark.parametrize("size", [1, 127, 128, 129, 40_000])
def test_cumulative_sums_are_exact(size):
    x = np.random.default_rng(2).integers(0, 400, size).astype(np.int32)
    np.testing.assert_array_equal(_cumsum(jnp.asarray(x)), np.cumsum(x))


@pytest.mark.parametrize("alignment", [1, 4])
def test_rows_and_assignments_find_each_other_on_every_platform(alignment, monkeypatch):
    for platform in ("cpu", "gpu"):  # by scatters, by sorting
        monkeypatch.setattr(expert, "platform", lambda platform=platform: platform)
        plan = _plan(jnp.asarray(EXPERTS), E, alignment)
        counts = np.bincount(EXPERTS.reshape(-1), minlength=E)
        np.testing.assert_array_equal(plan.group_sizes, -(-counts // alignment) * alignment)
        ends = np.cumsum(plan.group_sizes)
        assert len(plan.assignment) >= ends[-1]
        for row, assignment in enumerate(np.asarray(plan.assignment)):
            if assignment < EXPERTS.size:
                assert plan.row.reshape(-1)[assignment] == row
                assert EXPERTS.T.reshape(-1)[assignment] == np.searchsorted(ends, row, side="right")
        assert sorted(plan.assignment)[: EXPERTS.size] == list(range(EXPERTS.size))


def test_the_route_of_the_docstring_s_example():
    counts = jnp.array([[[2, 1], [0, 1]], [[1, 2], [3, 0]]])
    route = _route(counts, jnp.array(0), rows=6, buffer=12, alignment=1)
    assert route.sent.tolist() == [[2, 1], [0, 1]]
    assert route.first.tolist() == [[0, 2], [3, 3]]
    assert route.slot.tolist() == [[0, 3], [0, 3]]
    assert route.received.tolist() == [[2, 1], [1, 2]]
    assert route.received_slot.tolist() == [[0, 3], [2, 4]]
    rows = np.array([*"aabd..", *"ABBCCC", "-"])  # six of each device, and what empty slots read
    assert "".join(rows[route.source_of_slot]).rstrip("-") == "aaAbBB"


def test_a_full_buffer_has_room_for_the_gaps_of_every_expert():
    # Four experts of one row each, which fill the buffer; then each begins at a multiple of 8.
    route = _route(jnp.ones((1, 1, 4), int), jnp.array(0), rows=4, buffer=4, alignment=8)
    assert route.sizes.tolist() == [8] * 4
    assert route.source_of_slot[::8].tolist() == [0, 1, 2, 3]
    assert len(route.source_of_slot) == 4 * 8


@pytest.mark.parametrize("alignment", [1, 64])
def test_identity_experts_give_each_token_back_times_its_weights(alignment):
    x, weights = make()
    y = apply_experts(
        x,
        jnp.asarray(EXPERTS),
        weights,
        lambda rows, weights, sizes: weights[:, None] * rows,
        num_experts=E,
        alignment=alignment,
    )
    np.testing.assert_allclose(y, x * weights.sum(1, keepdims=True), rtol=1e-6)


def test_a_tokens_rows_are_added_in_float32():
    # Six rows, in bfloat16: 1, then five of 2^-9, each of which would round away if added to 1.
    experts = jnp.arange(E)[None]
    y = apply_experts(
        jnp.ones((1, D), jnp.bfloat16),
        experts,
        jnp.where(experts == 0, 1.0, 2.0**-9),
        lambda rows, weights, sizes: (weights[:, None] * rows).astype(rows.dtype),
        num_experts=E,
    )
    np.testing.assert_array_equal(y.astype(jnp.float32), 1 + 2.0**-7)  # the nearest to 1 + 5/512


def test_a_cpu_gathers_a_tokens_rows_one_by_one():
    k, tokens, size = 4, 512, 64
    experts = (jnp.arange(tokens)[:, None] + jnp.arange(k)) % E

    @jax.jit
    def program(x, weights):
        return apply_experts(x, experts, weights, lambda rows, *_: rows, num_experts=E)

    x, weights = jnp.ones((tokens, size), jnp.bfloat16), jnp.ones((tokens, k))
    text = program.lower(x, weights).compile().as_text()
    # One gather of them all takes XLA:CPU five times as long in bfloat16.
    assert f"[{tokens},{size}]" in text
    assert f"[{k},{tokens},{size}]" not in text


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
        def compute(rows, weights, sizes):
            of = matrices[expert_of(rows, sizes)]
            return weights[:, None] * jnp.tanh(jnp.einsum("rd,rdf->rf", rows, of))

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
        x,
        jnp.asarray(EXPERTS),
        weights,
        lambda *given: seen.append(given) or given[0],
        num_experts=E,
        alignment=alignment,
    )
    ((rows, row_weights, sizes),) = seen
    counts = np.bincount(EXPERTS.ravel(), minlength=E)
    np.testing.assert_array_equal(sizes, -(-counts // alignment) * alignment)
    assert len(rows) % alignment == 0
    start = 0
    for e in range(E):
        tokens = np.nonzero(e == EXPERTS.T)[1]  # those that have it first, then second
        np.testing.assert_array_equal(rows[start : start + counts[e]], np.asarray(x)[tokens])
        np.testing.assert_array_equal(
            row_weights[start : start + counts[e]], np.asarray(weights).T[e == EXPERTS.T]
        )
        assert not rows[start + counts[e] : start + sizes[e]].any()
        start += sizes[e]
    assert not rows[start:].any()


def test_split_experts_equal_whole_ones_by_either_exchange_and_count_what_finds_no_place():
    run_python(TESTS / "split_experts.py", devices=4, check=True)
