"""Speculation changes how fast tokens come, not which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracles import quick_jit, random_model, small_config

from qwen3next_jax.config import FULL
from qwen3next_jax.inference import decode
from qwen3next_jax.inference.decode import Generation, generate
from qwen3next_jax.inference.sampling import Sampling
from qwen3next_jax.inference.speculative import draft, verify
from qwen3next_jax.model.cache import empty_cache

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 30, 12, 4]]


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(mtp_steps=1), scale=0.3)


@pytest.fixture
def drafts_known_in_advance(monkeypatch):
    """Gives `decode` drafts that are mostly right: a random model's own hardly ever are."""

    def use(truth):
        """`truth` [B, n]: of each row, prompt and continuation; some drafts are spoilt."""

        def draft(model, hidden, next_tokens, positions, last, cache, *, count, sampling, **_):
            row = jnp.arange(len(hidden))[:, None]
            place = positions[row[:, 0], last][:, None] + 2 + jnp.arange(count)
            tokens = jnp.asarray(truth)[row, place.clip(max=truth.shape[1] - 1)]
            tokens = jnp.where((place * place + row) % 7 < 2, (tokens + 1) % 61, tokens)
            return tokens, jax.nn.one_hot(tokens, 61), cache

        monkeypatch.setattr(decode, "draft", draft)
        for compiled in (decode._begin, decode._run):
            compiled.clear_cache()

    yield use
    for compiled in (decode._begin, decode._run):
        compiled.clear_cache()


@pytest.mark.parametrize(("drafts", "penalty"), [(4, 1.3), (1, 1.0)])
def test_greedy_tokens_are_the_same_whatever_is_drafted(
    model, drafts, penalty, drafts_known_in_advance
):
    options = dict(max_new_tokens=24, repetition_penalty=penalty)
    plain = generate(model, PROMPTS, speculative=False, **options)
    assert generate(model, PROMPTS, speculative=drafts, **options) == plain

    truth = np.zeros((3, 64), np.int32)
    for row, prompt, new in zip(truth, PROMPTS, plain, strict=True):
        row[: len(prompt) + len(new)] = prompt + new
    drafts_known_in_advance(truth)
    generation = Generation(model, PROMPTS, speculative=drafts, **options)
    assert collect(generation) == plain
    # Some drafts are wrong, and those after a wrong one are rejected too.
    shares = np.array(generation.accepted) / generation.drafted
    assert 0.4 < shares[0] < 0.9
    assert (np.diff(shares) <= 0).all()
    assert generation.passes < 20

    # A stop token in the middle of accepted drafts ends its row there.
    stop = plain[0][9]
    stopped = generate(model, PROMPTS, speculative=drafts, stop_tokens=[stop], **options)
    for row, whole in zip(stopped, plain, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


def test_drafts_at_the_end_of_the_slots_overwrite_nothing(model):
    prompt = np.random.default_rng(0).integers(0, 61, 108).tolist()  # and 20 more fill the slots
    plain = generate(model, [prompt], max_new_tokens=20, speculative=False)
    assert generate(model, [prompt], max_new_tokens=20, speculative=4) == plain


def test_drafts_are_those_of_the_mtp_module_over_whole_rows(model, monkeypatch):
    monkeypatch.setattr(decode, "_PREFILL", 16)  # prompts are read in two pieces
    # So many that a wrong position or cache changes the likeliest token of some.
    prompts = np.random.default_rng(0).integers(0, 61, (8, 21))
    generation = Generation(model, prompts.tolist(), speculative=3)
    state, new = generation._read_prompts(*decode._for_decoding(model))

    tokens = jnp.concatenate([prompts, new], axis=1)
    rows, following = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden = quick_jit(lambda rows: model.hidden_states(rows)[0])(rows)
    cache = empty_cache(model.config, FULL, batch=len(rows), slots=32)
    options = dict(count=3, sampling=Sampling(), seen=None, key=jax.random.key(0))
    drafts = quick_jit(
        lambda *given: draft(model, *given, positions, positions[:, -1], cache, **options)[0]
    )(hidden, following)

    @quick_jit
    def guess(hidden, following, last):
        """Without a cache, over all of the rows; what stands behind `last` does not reach it."""
        index = jnp.broadcast_to(jnp.arange(hidden.shape[1]), following.shape)
        out, *_ = model.mtp(hidden, model.embed(following), positions=index)
        token = model.logits(out)[:, last].argmax(-1)
        return hidden.at[:, last + 1].set(out[:, last]), following.at[:, last + 1].set(token)

    hidden = jnp.pad(hidden, ((0, 0), (0, 3), (0, 0)))
    following = jnp.pad(following, ((0, 0), (0, 3)))
    for last in range(20, 23):
        hidden, following = guess(hidden, following, last)
    np.testing.assert_array_equal(drafts, following[:, 21:])
    np.testing.assert_array_equal(state.drafts, following[:, 21:])


def collect(generation, rows=3):
    new = [[] for _ in range(rows)]
    for tokens in generation:
        for row, more in zip(new, tokens, strict=True):
            row += more
    return new


@pytest.mark.parametrize("broken", [False, True])
def test_verified_tokens_follow_the_model_s_distribution(broken):
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.full(6, 0.8), n).astype(np.float32) for n in (3, 2))
    many = 40_000
    q_rows, p_rows = (jnp.broadcast_to(x, (many, *x.shape)) for x in (q, p))
    sampling = Sampling(temperature=1.0)
    draft_key, key = jax.random.split(jax.random.key(0))
    drafts = sampling.draw(q_rows, draft_key)
    # What is tested must be able to fail: here with an acceptance that ignores q.
    seen_q = jnp.full_like(q_rows, 1 / 6) if broken else q_rows
    tokens, kept = (
        np.asarray(x) for x in verify(drafts, seen_q, p_rows, sampling=sampling, key=key)
    )
    p_values = []
    for place in range(3):
        reached = tokens[kept >= place, place]
        expected = p[place].astype(np.float64)
        expected *= len(reached) / expected.sum()
        p_values.append(scipy.stats.chisquare(np.bincount(reached, minlength=6), expected).pvalue)
    if broken:
        assert min(p_values) < 1e-9
    else:
        assert min(p_values) > 1e-3
        overlap = np.minimum(p[0], q[0]).sum()  # the best any rule can do
        assert abs((kept >= 1).mean() - overlap) < 0.0125  # five standard deviations


def test_a_rejection_that_leaves_nothing_draws_from_the_model():
    """Where p and q differ by less than their rounding: q gives token 0 a little more than p."""
    p = jnp.array([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    q = jnp.array([[[1e-12, 1.0, 0.0]]])
    sampling, key = Sampling(temperature=1.0), jax.random.key(0)
    tokens, kept = verify(jnp.array([[0]]), q, p, sampling=sampling, key=key)
    assert (kept.tolist(), tokens[0, 0]) == ([0], 1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param(dict(top_k=40, temperature=1.5), id="top_k"),
    ],
)
def test_sampled_continuations_have_the_model_s_distribution(model, options):
    """The second token's distribution, against all of the first token's 61 ways to it."""
    prompt, rows = [5, 9, 2], 6000
    options = {"temperature": 1.0, **options}
    sampling = Sampling(**options)
    forward = quick_jit(lambda tokens: sampling.probabilities(model(tokens)[:, -2:]))
    first = forward(jnp.array([[*prompt, 0]]))[0, 0]
    second = forward(jnp.array([[*prompt, token] for token in range(61)]))[:, 1]
    want = np.asarray(first @ second, np.float64)

    generation = Generation(
        model,
        [prompt] * rows,
        max_new_tokens=2,
        speculative=1,
        seed=3,
        **options,
    )
    new = np.array(collect(generation, rows))
    assert new.shape == (rows, 2)
    share = generation.accepted[0] / generation.drafted[0]
    assert 0.1 < share < 0.95, "both ways of getting a token must be taken"
    for place, distribution in enumerate((np.asarray(first, np.float64), want)):
        likely = distribution * rows >= 5  # where chi-square holds; the rest is one class
        counts = np.bincount(new[:, place], minlength=61)
        got = [*counts[likely], counts[~likely].sum()]
        expected = [*distribution[likely] * rows, distribution[~likely].sum() * rows]
        got, expected = np.array(got), np.array(expected)
        got, expected = got[expected > 0], expected[expected > 0]
        assert scipy.stats.chisquare(got, expected * got.sum() / expected.sum()).pvalue > 1e-3


def test_drafting_needs_an_mtp_module(model):
    plain = random_model(small_config(), scale=0.3)
    assert Generation(plain, PROMPTS).drafted == []
    assert Generation(model, PROMPTS).drafted == [0] * decode.DRAFTS
    with pytest.raises(ValueError, match=r"speculative=True needs an MTP module"):
        Generation(plain, PROMPTS, speculative=True)
    with pytest.raises(ValueError, match="speculative=-1 must be"):
        Generation(model, PROMPTS, speculative=-1)
