"""What layers tell of themselves, each statistic by itself; all together: test_diagnostics.py."""

import jax.numpy as jnp
import numpy as np

from qwen3next_jax.model.statistics import (
    Largest,
    Mean,
    combine_parts,
    concatenate_layers,
    largest,
    sink_share,
    token_mean,
)

SEGMENTS = np.array([[1] * 21 + [2] * 19, [1] * 7 + [2] * 20 + [0] * 13], np.int32)


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_means_and_maxima_leave_padding_out():
    (x,) = arrays((2, 40, 3))
    x[1, 30] = 100  # padding
    mean = token_mean(jnp.asarray(x), jnp.asarray(SEGMENTS))
    real = x[SEGMENTS != 0]
    assert mean.tokens == len(real) == 67
    np.testing.assert_allclose(mean.total / mean.tokens, real.mean(0), atol=1e-6)
    assert largest(jnp.asarray(x), jnp.asarray(SEGMENTS)).value == np.abs(real).max()
    assert largest(jnp.asarray(x), None).value == 100
    assert token_mean(jnp.asarray(x), None).tokens == 80


def test_the_sink_is_what_a_plain_softmax_gives_the_first_token():
    q, k = arrays((2, 40, 4, 8), (2, 40, 2, 8))
    shares = []
    for row in range(2):
        for t in range(1, 40, 2):  # 40 tokens: stretches of 40 // 16 = 2, the last of each
            start = np.flatnonzero(SEGMENTS[row] == SEGMENTS[row, t])[0]
            if SEGMENTS[row, t] == 0 or t == start:
                continue
            for head in range(4):
                scores = k[row, start : t + 1, head // 2] @ q[row, t, head] / np.sqrt(8)
                shares.append(np.exp(scores[0]) / np.exp(scores).sum())
    got = sink_share(jnp.asarray(q), jnp.asarray(k), jnp.asarray(SEGMENTS))
    assert got.tokens == len(shares) / 4
    np.testing.assert_allclose(got.total / got.tokens, np.mean(shares), rtol=1e-5)


def test_a_head_that_parks_its_weight_on_the_first_token_is_seen():
    k = np.zeros((1, 40, 1, 8), np.float32)
    k[0, 0] = 30.0
    q = np.ones((1, 40, 2, 8), np.float32)
    got = sink_share(jnp.asarray(q), jnp.asarray(k), None)
    assert got.total / got.tokens > 0.999
    even = sink_share(jnp.asarray(q), jnp.zeros((1, 40, 1, 8)), None)
    want = np.mean([1 / (t + 1) for t in range(1, 40, 2)])
    np.testing.assert_allclose(even.total / even.tokens, want, rtol=1e-5)


def test_tokens_behind_the_last_whole_stretch_are_not_looked_at():
    # 45 tokens: stretches of 45 // 16 = 2. Of t + 1 tokens of equal scores, each has its share.
    even = sink_share(jnp.ones((1, 45, 2, 8)), jnp.zeros((1, 45, 1, 8)), None)
    want = np.mean([1 / (t + 1) for t in range(1, 44, 2)])
    np.testing.assert_allclose(even.total / even.tokens, want, rtol=1e-5)  # float32 sums


def test_of_few_tokens_each_is_looked_at():
    even = sink_share(jnp.ones((1, 17, 2, 8)), jnp.zeros((1, 17, 1, 8)), None)
    assert even.tokens == 16  # all but the first
    want = np.mean([1 / (t + 1) for t in range(1, 17)])
    np.testing.assert_allclose(even.total / even.tokens, want, rtol=1e-5)  # float32 sums


def test_parts_weigh_by_their_tokens():
    parts = {
        "gate": Mean(jnp.array([10.0, 1.0]), jnp.array([20.0, 1.0])),
        "peak": Largest(jnp.array([3.0, 5.0])),
    }
    whole = combine_parts(parts)
    assert whole["gate"].total / whole["gate"].tokens == 11 / 21  # not the mean of 0.5 and 1
    assert whole["peak"].value == 5


def test_observed_statistics_are_stacked_in_layer_order():
    delta = {"a": Largest(jnp.ones(2)), "b": Largest(jnp.full(2, 2.0))}
    attention = {"b": Largest(jnp.full(1, 3.0)), "c": Largest(jnp.full(1, 4.0))}
    joined = concatenate_layers([delta, attention])
    assert {name: x.value.tolist() for name, x in joined.items()} == {
        "a": [1, 1],
        "b": [2, 2, 3],
        "c": [4],
    }
