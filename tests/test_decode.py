"""Generated tokens are those of the full forward pass, whatever shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit, random_model, small_config

from qwen3next_jax.inference.decode import _choose, generate

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 30, 12, 4]]


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(), scale=0.3)


def test_greedy_tokens_are_the_full_forward_pass_s_likeliest(model):
    new = generate(model, PROMPTS, max_new_tokens=6)
    forward = quick_jit(lambda tokens: model(tokens))
    for prompt, continuation in zip(PROMPTS, new, strict=True):
        assert len(continuation) == 6
        # All positions in one pass, padded to one length: what follows does not matter.
        tokens = prompt + continuation
        logits = forward(jnp.array([tokens + [0] * (13 - len(tokens))]))[0]
        for t, token in enumerate(continuation):
            scores = np.asarray(logits[len(prompt) + t - 1])
            # Two float32 computations may disagree on a near tie only.
            assert scores.max() - scores[token] <= 1e-4


def test_a_stop_token_ends_its_row_alone_and_is_not_returned(model):
    free = generate(model, PROMPTS, max_new_tokens=6)
    stop = free[0][2]
    stopped = generate(model, PROMPTS, max_new_tokens=6, stop_tokens=(stop,))
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)


def test_samples_follow_the_distribution_and_top_p_cuts_its_tail():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits, (20_000, 4))
    drawn = np.bincount(_choose(many, jax.random.key(0), 1.0, None), minlength=4) / 20_000
    # Five standard deviations of a share of 20,000 draws are at most 0.018.
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.018)
    drawn = np.bincount(_choose(many, jax.random.key(1), 1.0, 0.7), minlength=4) / 20_000
    np.testing.assert_allclose(drawn, [0.625, 0.375, 0, 0], atol=0.018)


def test_the_same_seed_gives_the_same_text_and_another_one_another(model):
    first, again, other = (
        generate(model, PROMPTS, max_new_tokens=6, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_prompts_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="begin it with the tokenizer's BOS"):
        generate(model, [[1], []])
    with pytest.raises(ValueError, match="max_position_embeddings=512"):
        generate(model, [[1] * 500], max_new_tokens=20)
