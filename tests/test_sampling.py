"""Distributions of the next token against transformers' processors, and draws against them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwen3next_jax.inference.sampling import Sampling

OPTIONS = [
    {},
    dict(temperature=0.6),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.7),
    dict(top_p=0.01),
    dict(min_p=0.1),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.6, temperature=1.4, top_k=30, top_p=0.9, min_p=0.02),
]


def theirs(options, logits, sequences):
    """What transformers makes of logits, its processors in the order of its own `generate`."""
    processors = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores = torch.tensor(logits)
    for name, kind in processors.items():
        if name in options:
            scores = kind(options[name])(torch.tensor(sequences), scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distributions_are_those_of_transformers(options):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((4, 200), np.float32)
    sequences = rng.integers(0, 200, (4, 60))
    seen = np.zeros((4, 200), bool)
    np.put_along_axis(seen, sequences, True, axis=1)
    sampling = Sampling(**{"temperature": 1.0, **options})
    got = sampling.probabilities(jnp.asarray(logits), jnp.asarray(seen))
    # Two float32 softmaxes.
    np.testing.assert_allclose(got, theirs(options, logits, sequences), atol=1e-6)


def test_top_p_of_half_a_uniform_distribution_keeps_all_that_tie():
    # Any half would do; keeping what ties is what a threshold can say.
    got = Sampling(temperature=1.0, top_p=0.5).probabilities(jnp.zeros((1, 8)))
    np.testing.assert_allclose(got, np.full((1, 8), 1 / 8))


def test_temperature_0_has_all_mass_on_the_likeliest_token_after_the_penalty():
    logits = jnp.array([[2.0, 1.5, -1.0]])
    greedy = Sampling(repetition_penalty=2.0)
    seen = jnp.array([[True, False, False]])
    np.testing.assert_array_equal(greedy.probabilities(logits, seen), [[0, 1, 0]])
    assert greedy.draw(greedy.probabilities(logits, seen), jax.random.key(0)).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-10, 1e-20, 1e-30, 1e-40, 1e-300])
def test_a_small_temperature_takes_the_likeliest_token(temperature):
    logits = 3 * np.random.default_rng(0).standard_normal((8, 61), np.float32)
    got = jax.jit(Sampling(temperature=temperature).probabilities)(jnp.asarray(logits))
    np.testing.assert_array_equal(got, np.eye(61)[logits.argmax(-1)])


@pytest.mark.parametrize("top_p", [1e-9, 1e-38, 1e-46, 1e-300])
def test_a_small_top_p_keeps_the_likeliest_token_alone(top_p):
    logits = 3 * np.random.default_rng(0).standard_normal((8, 61), np.float32)
    got = jax.jit(Sampling(temperature=1.0, top_p=top_p).probabilities)(jnp.asarray(logits))
    np.testing.assert_array_equal(got, np.eye(61)[logits.argmax(-1)])


@pytest.mark.parametrize("penalty", [1e-30, 1e30])
def test_the_most_extreme_penalties_leave_a_distribution(penalty):
    logits = jnp.array([[1e3, -1e3, 0.0, 1.0]])
    sampling = Sampling(temperature=1.0, repetition_penalty=penalty)
    for seen in ([True] * 4, [True, False, False, True]):
        np.testing.assert_allclose(sampling.probabilities(logits, jnp.array([seen])).sum(), 1)


def test_draws_follow_their_weights():
    weights = jnp.broadcast_to(jnp.array([1.0, 0.6, 0.3, 0.0, 0.1]), (20_000, 5))
    drawn = Sampling(temperature=1.0).draw(weights, jax.random.key(0))
    shares = np.bincount(drawn, minlength=5) / 20_000
    # Five standard deviations of a share of 20,000 draws are at most 0.018.
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0, 0.05], atol=0.018)
    assert shares[3] == 0


@pytest.mark.slow
def test_improbable_tokens_of_a_large_vocabulary_are_drawn():
    sampling, V = Sampling(temperature=1.0), 151_936
    weights = jnp.full(V, 3e-8).at[0].set(1.0)

    @jax.jit
    def improbable(key):
        return (sampling.draw(jnp.broadcast_to(weights, (64, V)), key) > 0).sum()

    found = sum(int(improbable(key)) for key in jax.random.split(jax.random.key(0), 32))
    # 9.3 of 2048 on average; by uniform numbers of 23 bits it would be 0.7.
    assert 4 <= found <= 18


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", None),
        ("temperature", "0.8"),
        ("top_p", "0.5"),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", float("inf")),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r} must"):
        Sampling(**{option: value})
