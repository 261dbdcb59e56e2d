"""The delta rule against a token-by-token recurrence in float64, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from oracles import interprets_transposed, quick_jit, relative_error

from qwen3next_jax.ops import delta_rule
from qwen3next_jax.ops.delta_rule import (
    default_implementation,
    gated_delta_rule,
    gated_delta_rule_stretch,
)


def recurrence(q, k, v, g, beta, state, segments):
    """The equation itself, in numpy's float64."""
    B, T, N, P = v.shape
    q, k = (np.repeat(x, N // k.shape[2], axis=2) for x in (q, k))
    out = np.zeros((B, T, N, P))
    final = np.array(state)
    for b in range(B):
        previous = None
        for t in range(T):
            if segments[b, t] == 0:
                continue
            for n in range(N):
                S = final[b, n] if previous in (None, segments[b, t]) else 0 * final[b, n]
                S = np.exp(g[b, t, n]) * S
                S = S + np.outer(k[b, t, n], beta[b, t, n] * (v[b, t, n] - S.T @ k[b, t, n]))
                final[b, n], out[b, t, n] = S, S.T @ q[b, t, n]
            previous = segments[b, t]
    return out, final


def recurrence_gradients(q, k, v, g, beta, state, segments, d_out, d_final):
    """Reverse mode of `recurrence`, step by step, in float64."""
    B, T, N, _ = v.shape
    R = N // k.shape[2]
    grads = [np.zeros_like(x) for x in (q, k, v, g, beta, state)]
    dq, dk, dv, dg, dbeta, dstate = grads
    for b in range(B):
        for n in range(N):
            S, previous, tape = state[b, n], None, []
            for t in range(T):
                if segments[b, t] == 0:
                    continue
                fresh = previous not in (None, segments[b, t])
                S = 0 * S if fresh else S
                tape.append((t, fresh, S))
                S = np.exp(g[b, t, n]) * S
                K = k[b, t, n // R]
                S = S + np.outer(K, beta[b, t, n] * (v[b, t, n] - S.T @ K))
                previous = segments[b, t]
            dS = d_final[b, n].copy()
            for t, fresh, before in reversed(tape):
                Q, K, V = q[b, t, n // R], k[b, t, n // R], v[b, t, n]
                e, w = np.exp(g[b, t, n]), beta[b, t, n]
                D = e * before
                error = V - D.T @ K
                after = D + np.outer(K, w * error)
                dq[b, t, n // R] += after @ d_out[b, t, n]
                dS = dS + np.outer(Q, d_out[b, t, n])
                d_write = dS.T @ K
                dk[b, t, n // R] += dS @ (w * error) - D @ (w * d_write)
                dbeta[b, t, n] += d_write @ error
                dv[b, t, n] += w * d_write
                dD = dS - np.outer(K, w * d_write)
                dg[b, t, n] += (dD * D).sum()
                dS = e * dD * (not fresh)
            dstate[b, n] += dS
    return grads


def make(case, *, B=2, T=100, K=2, N=4, H=16, P=24):
    rng = np.random.default_rng(0)
    if case.startswith("length"):
        T = int(case.split()[1])
    k = rng.standard_normal((B, T, K, H))
    if case == "correlated keys":  # correlation 0.9 between any two
        k = np.sqrt(0.9) * rng.standard_normal((B, 1, K, H)) + np.sqrt(0.1) * k
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q = rng.standard_normal((B, T, K, H))
    q *= H**-0.5 / np.linalg.norm(q, axis=-1, keepdims=True)
    v = rng.standard_normal((B, T, N, P))
    g = -np.exp(rng.uniform(-5, 1, (B, T, N)))
    beta = rng.uniform(0.05, 0.95, (B, T, N))
    state = np.zeros((B, N, H, P))
    segments = np.ones((B, T), np.int32)
    if case == "no decay":
        g[:] = 0
    if case == "decay -30":
        g[:] = -30
    if case == "decays in turn":
        g[:, 0::2], g[:, 1::2] = -30, -0.05
    if case == "beta one":
        beta[:] = 1
    if case == "zero rows":
        for x in (q, k, v):
            x[:, 10:20] = 0
            x[1] = 0
    if case in ("initial state", "documents", "padding") or case.startswith("length"):
        state = rng.standard_normal(state.shape)
    if case == "documents":  # many in a chunk, some one token long, one longer than a chunk
        for b in range(B):
            ends = np.sort(rng.choice(np.arange(1, 30), 8, replace=False))
            segments[b] = 1 + np.searchsorted(ends, np.arange(T), side="right")
    if case == "padding":
        segments[0, 70:], segments[1, :5], segments[1, 30:50], segments[1, 50:] = 0, 0, 0, 2
    return q, k, v, g, beta, state, segments


CASES = [
    "plain", "no decay", "decay -30", "decays in turn", "beta one", "correlated keys", "zero rows",
    "length 1", "length 63", "length 65", "length 130", "initial state", "documents", "padding",
]  # fmt: skip


def run(arrays, segments, implementation, dtype=jnp.float32):
    q, k, v, g, beta, state = (jnp.asarray(x, dtype) for x in arrays)
    return gated_delta_rule(
        q,
        k,
        v,
        log_decay=g,
        beta=beta,
        initial_state=state.astype(jnp.float32),
        segment_ids=None if segments is None else jnp.asarray(segments),
        implementation=implementation,
    )


IMPLEMENTATIONS = ["reference", "chunked", "pallas"]


@functools.cache
def with_gradients(implementation, dtype=jnp.float32):
    def f(arrays, segments, cotangents):
        values, vjp = jax.vjp(lambda *a: run(a, segments, implementation, dtype), *arrays)
        return values, vjp(cotangents)

    return quick_jit(f)


def case_of(case, implementation):
    # Interpreted kernels take seconds to compile, for each length anew.
    slow = implementation == "pallas" and case.startswith("length")
    return pytest.param(case, implementation, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("case", "implementation"), [case_of(c, i) for i in IMPLEMENTATIONS for c in CASES]
)
def test_values_and_gradients_agree_with_the_float64_recurrence(case, implementation):
    check(implementation, case, *make(case))


def test_kernels_for_tpus_hand_states_and_their_gradients_from_program_to_program():
    # Three chunks, each of a program of its own, of as few heads as there can be.
    case = "length 130"
    check("pallas", case, *make(case, B=1, K=1, N=2, H=8, P=8))


def check(implementation, case, *arrays):
    *arrays, segments = arrays
    # The oracle starts from what float32 can hold, so that only the computation is compared.
    arrays = [x.astype(np.float32).astype(np.float64) for x in arrays]
    out, final = recurrence(*arrays, segments)
    rng = np.random.default_rng(1)
    d_out, d_final = rng.standard_normal(out.shape), rng.standard_normal(final.shape)
    expected = recurrence_gradients(*arrays, segments, d_out, d_final)

    arrays32, cotangents = jax.tree.map(jnp.float32, (arrays, (d_out, d_final)))
    (got, got_final), grads = with_gradients(implementation)(
        arrays32, jnp.asarray(segments), cotangents
    )

    def compare(name, got, want, scale=0.0, tolerance=1e-5):
        error = np.linalg.norm(np.asarray(got, np.float64) - want)
        assert error <= tolerance * max(np.linalg.norm(want), scale), name

    compare("out", got, out)
    compare("final state", got_final, final)
    names = ["q", "k", "v", "g", "beta", "state"]
    for name, gradient, want in zip(names, grads, expected, strict=True):
        if name == "g":
            # Under strong decay the true dg is a tiny remainder of larger terms: its error is
            # measured against those. Mixed decays cost some more digits of the exponents.
            terms = sum(np.linalg.norm(x * dx) for x, dx in zip(arrays[:2], expected, strict=False))
            compare(name, gradient, want, terms, 5e-5 if case == "decays in turn" else 1e-5)
        else:
            compare(name, gradient, want)


def test_many_rules_under_vmap_are_each_its_own():
    # Compiled without our options, with one axis more, sums once crashed on CPUs.
    *arrays, segments = map(np.float32, make("documents", T=40))
    segments = segments.astype(np.int32)
    cotangents = (np.ones_like(arrays[2]), np.ones_like(arrays[5]))

    def f(arrays):
        values, vjp = jax.vjp(lambda *a: run(a, segments, "chunked"), *arrays)
        return values, vjp(cotangents)

    scaled = [(x, np.float32(0.5) * x) for x in arrays]
    together = jax.jit(jax.vmap(f))([np.stack(pair) for pair in scaled])
    for i in range(2):
        alone = with_gradients("chunked")([pair[i] for pair in scaled], segments, cotangents)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            # The same float32 sums in another order.
            np.testing.assert_allclose(a[i], b, atol=1e-5 * np.abs(b).max())


def test_ids_are_spread_over_padding_by_tokens_and_not_by_pairs_of_them():
    *arrays, segments = make("documents", T=64)  # whole chunks
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    program = quick_jit(lambda arrays, ids: run(arrays, ids, "chunked"))
    text = program.lower(arrays, jnp.asarray(segments)).compile().as_text()
    kernels = text.split("\n\n")
    decays = [kernel for kernel in kernels if "exponential(" in kernel]
    assert decays
    assert any("take_along_axis" in kernel for kernel in kernels)
    assert not any("take_along_axis" in kernel for kernel in decays)


def test_the_oracle_s_gradients_are_those_of_finite_differences():
    *arrays, segments = make("documents", B=1, T=40, K=1, N=2, H=3, P=2)
    rng = np.random.default_rng(2)
    out, final = recurrence(*arrays, segments)
    d_out, d_final = rng.standard_normal(out.shape), rng.standard_normal(final.shape)
    grads = recurrence_gradients(*arrays, segments, d_out, d_final)

    def value(arrays):
        out, final = recurrence(*arrays, segments)
        return (out * d_out).sum() + (final * d_final).sum()

    for i, gradient in enumerate(grads):
        direction = rng.standard_normal(gradient.shape)
        plus, minus = ([*arrays] for _ in range(2))
        plus[i], minus[i] = arrays[i] + 1e-5 * direction, arrays[i] - 1e-5 * direction
        numeric = (value(plus) - value(minus)) / 2e-5
        np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-6)


@pytest.mark.parametrize(
    "implementation", ["reference", "chunked", pytest.param("pallas", marks=pytest.mark.slow)]
)
def test_a_packed_document_gives_what_it_gives_alone_whatever_its_neighbours(implementation):
    *arrays, segments = make("documents")
    start, end = np.flatnonzero(segments[0] == 3)[[0, -1]] + np.array([0, 1])
    arrays[-1] = 0 * arrays[-1]
    alone = [x[:1, start:end] for x in arrays[:-1]]

    def packed(*document):
        rest = [x.copy() for x in arrays]
        for x, factor in zip(rest, (1e3, -1, 1e3), strict=False):  # keys stay of unit length
            x[:, :start], x[:, end:] = factor * x[:, :start], -factor * x[:, end:]
        joined = [
            jnp.asarray(x).at[:1, start:end].set(d) for x, d in zip(rest, document, strict=False)
        ]
        return run([*joined, rest[-1]], segments, implementation)[0][:1, start:end]

    def by_itself(*document):
        state = jnp.zeros((1, *arrays[-1].shape[1:]))
        return run([*document, state], None, implementation)[0]

    cotangent = np.random.default_rng(3).standard_normal((1, end - start, *arrays[2].shape[2:]))

    def with_gradients(f):
        out, vjp = jax.vjp(f, *alone)
        return out, *vjp(jnp.asarray(cotangent, jnp.float32))

    got, want = (quick_jit(functools.partial(with_gradients, f))() for f in (packed, by_itself))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_sequence_cut_in_two_goes_on_from_the_returned_state():
    *arrays, _ = make("initial state", T=130)
    step = jax.jit(lambda arrays: run(arrays, None, "chunked"))
    whole, final = step(arrays)
    state, parts = arrays[-1], []
    for piece in (slice(0, 70), slice(70, 129), slice(129, 130)):
        part, state = step([x[:, piece] for x in arrays[:-1]] + [state])
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


@pytest.mark.parametrize("case", ["documents", "decays in turn", "correlated keys"])
@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
def test_gradients_of_bfloat16_values_are_right_to_bfloat16_s_digits(case, implementation):
    check_bfloat16(implementation, *make(case))


@interprets_transposed
@pytest.mark.parametrize("case", ["documents", "padding", "decays in turn", "correlated keys"])
def test_kernels_for_hopper_gpus_are_right_to_bfloat16_s_digits(case, on_hopper):
    # A, scores and what is written are rounded as well; keys alike to 0.9 make it 7.3e-3, for g.
    check_bfloat16("hopper", *make(case, T=130, K=1, N=2, H=128, P=128), tolerance=1e-2)


def no_neighbours(combine, x, reverse=False):
    """A scan over stretches that finds none before or after, though maps are combined."""
    return jax.tree.map(lambda y: 0 * y, combine(x, x))


@interprets_transposed
def test_a_stretch_of_a_split_row_takes_kernels_for_hopper_gpus_too(on_hopper):
    *arrays, segments = make("documents", T=130, K=1, N=2, H=128, P=128)
    q, k, v, g, beta, state = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    rest = dict(log_decay=g, beta=beta, initial_state=state.astype(jnp.float32))
    rest |= dict(segment_ids=jnp.asarray(segments), implementation="hopper")

    def results(rule):
        (out, final), vjp = jax.vjp(rule, q, k, v)
        return out, final, *vjp((jnp.ones_like(out), jnp.ones_like(final)))

    split = functools.partial(gated_delta_rule_stretch, **rest, scan=no_neighbours)
    whole = functools.partial(gated_delta_rule, **rest)
    got, want = (quick_jit(functools.partial(results, f))() for f in (split, whole))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_hessian_vector_products_go_through_a_stretch_of_a_split_row(implementation):
    *arrays, segments = make("documents", T=40, K=1, N=2, H=8, P=8)
    q, k, v, g, beta, state = (jnp.asarray(x, jnp.float32) for x in arrays)
    rest = dict(log_decay=g, beta=beta, initial_state=state)
    rest |= dict(segment_ids=jnp.asarray(segments), implementation=implementation)

    def product(rule):
        def loss(k):
            out, final = rule(q, k, v)
            return (out**2).sum() + (final**2).sum()

        return jax.jvp(jax.grad(loss), (k,), (jnp.cos(k),))[1]

    split = functools.partial(gated_delta_rule_stretch, **rest, scan=no_neighbours)
    whole = functools.partial(gated_delta_rule, **rest)
    got, want = (quick_jit(functools.partial(product, f))() for f in (split, whole))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def check_bfloat16(implementation, *arrays, tolerance=6e-3):
    *arrays, segments = arrays
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays]
    rng = np.random.default_rng(4)
    out, final = recurrence(*arrays, segments)
    cotangents = rng.standard_normal(out.shape), rng.standard_normal(final.shape)
    cotangents = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in cotangents]
    expected = recurrence_gradients(*arrays, segments, *cotangents)
    (got, got_final), grads = with_gradients(implementation, jnp.bfloat16)(
        [jnp.asarray(x, jnp.float32) for x in arrays],
        jnp.asarray(segments),
        (jnp.asarray(cotangents[0], jnp.bfloat16), jnp.asarray(cotangents[1], jnp.float32)),
    )
    # Gradients and outputs are rounded to 8 bits, 2e-3 of each, and the kernels' states and
    # inverses before them; the largest error seen is 3.3e-3.
    for x, want in zip((got, got_final, *grads), (out, final, *expected), strict=True):
        assert relative_error(x, want) <= tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_decay_of_minus_infinity_forgets_everything(implementation):
    *arrays, segments = make("plain")
    arrays[3] = arrays[3].copy()
    arrays[3][:, 7] = -1e30  # to float64 as good as minus infinity
    out, final = recurrence(*arrays, segments)
    arrays[3][:, 7] = -np.inf
    got, got_final = run(arrays, segments, implementation)
    assert relative_error(got, out) <= 1e-5
    assert relative_error(got_final, final) <= 1e-5

    def total(g):
        given = [*arrays[:3], g, *arrays[4:]]
        return run(given, segments, implementation)[0].sum()

    assert np.isfinite(np.asarray(jax.grad(total)(jnp.asarray(arrays[3], jnp.float32)))).all()


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("invert", ["_inverse_on_cpu", "_inverse_by_blocks"])
def test_both_ways_to_invert_are_numpys(invert, chunk):
    lower = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 2, 2, 3, chunk, chunk))
    lower = np.tril(lower, -1).astype(np.float32)
    inverse = jax.jit(getattr(delta_rule, invert))(lower)
    assert relative_error(inverse, np.linalg.inv(np.eye(chunk) + lower.astype(np.float64))) < 1e-5


def test_a_scan_over_layers_keeps_no_mask_as_large_as_values():
    q, k, v, g, beta, _, segments = (jnp.asarray(x) for x in make("padding"))

    def loss(v):
        def layer(v, _):
            given = dict(log_decay=g, beta=beta, segment_ids=segments)
            return gated_delta_rule(q, k, v, **given, implementation="pallas")[0], None

        return jax.lax.scan(layer, v, length=3)[0].sum()

    def outer_scans(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan" and eqn.params["length"] == 3:
                yield eqn
            else:
                for inner in jaxprs_in_params(eqn.params):
                    yield from outer_scans(inner)

    scans = list(outer_scans(jax.make_jaxpr(jax.grad(loss))(v).jaxpr))
    assert len(scans) == 2  # forward and back
    masks = [x.aval for scan in scans for x in scan.invars if x.aval.dtype == bool]
    assert all(mask.size <= 3 * segments.size for mask in masks), masks


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_all_is_float32_where_double_precision_is_allowed(implementation):
    *arrays, segments = make("plain")

    def total(arrays):
        out, final = run(arrays, segments, implementation)
        return out.sum() + final.sum()

    with jax.enable_x64(True):
        given = [jnp.asarray(x, jnp.float32) for x in arrays]
        text = str(jax.make_jaxpr(jax.grad(total))(given))
    assert not re.search(r"f64\[\d", text)  # numbers may be


def test_bad_input_is_refused_with_the_values():
    *arrays, segments = make("plain", K=2, N=3)
    with pytest.raises(ValueError, match="3 value heads are not divisible by 2 key heads"):
        run(arrays, segments, "chunked")
    *arrays, segments = make("plain")
    with pytest.raises(ValueError, match="'quick' is unknown; expected 'chunked', 'pallas'"):
        run(arrays, segments, "quick")
    arrays = [x[:, :0] for x in arrays[:-1]] + arrays[-1:]
    with pytest.raises(ValueError, match="0 tokens hold no token"):
        run(arrays, None, "chunked")


def test_kernels_for_tpus_are_refused_where_they_cannot_run(monkeypatch):
    *arrays, segments = make("plain")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(ValueError, match="is for TPUs, and this is a gpu"):
            run(arrays, segments, "pallas")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for size in (16, 128):
        assert default_implementation(size, size, jnp.dtype("float32")) == "pallas"


def test_kernels_for_gpus_are_refused_where_they_cannot_run(monkeypatch):
    *arrays, segments = make("plain")
    with pytest.raises(ValueError, match="'hopper' is for GPUs, and this is a cpu"):
        run(arrays, segments, "hopper")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(
        ValueError, match="heads of 128, got float32, 16 for keys and 24 for values"
    ):
        run(arrays, segments, "hopper")
