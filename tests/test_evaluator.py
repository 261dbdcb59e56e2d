"""What an `Evaluator` finds does not depend on batches, lengths and devices."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit, random_model, small_config

from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.evaluation.evaluator import Evaluator, bucket
from qwen3next_jax.evaluation.samples import samples
from qwen3next_jax.inference.decode import Generation, generate
from qwen3next_jax.parallel.processes import Stopped

HERE = pathlib.Path(__file__).parent
HEADS = dict(linear_key_head_dim=16, linear_value_head_dim=16)


def test_a_length_is_rounded_up_to_one_of_a_few():
    for length in range(1, 20_000):
        assert length <= bucket(length) <= max(64, length * 3 // 2)
    assert len({bucket(length) for length in range(1, 20_000)}) == 18


@pytest.fixture(scope="module")
def model():
    # As many tokens as the tokenizer of bytes has, and an MTP module that must not matter.
    return random_model(small_config(vocab_size=264, mtp_steps=1, **HEADS), scale=0.2)


def rows():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in (2, 70, 65, 1, 30, 99, 64)]


@pytest.fixture(scope="module")
def plain(model):
    """Each row alone: its losses, and whether a token is the likeliest."""
    forward, found = quick_jit(model), []
    for row in rows():
        # What stands behind a token does not reach it; one length is compiled.
        padded = np.pad(row, (0, 100 - len(row)))
        logits = np.asarray(forward(jnp.asarray([padded])), np.float64)[0, : len(row) - 1]
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row) - 1), row[1:]]
        found.append((losses, logits.argmax(-1) == row[1:]))
    return found


@pytest.mark.parametrize(
    "batch_size",
    [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(0, marks=pytest.mark.slow)],
)
def test_scores_are_those_of_each_row_alone(model, plain, batch_size):
    scores = Evaluator(model, load_tokenizer("bytes"), batch_size=batch_size).score(rows())
    for (losses, likeliest), score in zip(plain, scores, strict=True):
        # float32 in another order. Most differ by less than 1e-5; where a key is short by chance,
        # dividing it by its length amplifies the rounding, and 5e-4 was seen.
        np.testing.assert_allclose(score.losses, losses, atol=1e-3)
        np.testing.assert_array_equal(score.margins == 0, likeliest)


def test_asked_to_stop_it_leaves_before_the_next_batch(model):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) == 2

    evaluator = Evaluator(model, load_tokenizer("bytes"), batch_size=3, should_stop=should_stop)
    with pytest.raises(Stopped):
        evaluator.with_model(model).score(rows())
    assert len(asked) == 2


def test_a_row_beyond_the_context_is_refused(model):
    evaluator = Evaluator(model, load_tokenizer("bytes"))
    with pytest.raises(
        ValueError, match=r"reads 513 of them; the model's context has 512\. Cut it"
    ):
        evaluator.score([[1] * 514])


def test_of_a_row_as_many_tokens_are_read_as_the_context_has(model, monkeypatch):
    def zeros(_, tokens, *others):
        return *np.zeros((2, *tokens.shape), np.float32), 0.0

    monkeypatch.setattr(Evaluator, "_on_mesh", zeros)
    [scores] = Evaluator(model, load_tokenizer("bytes")).score([[1] * 513])
    assert len(scores.losses) == len(scores.margins) == 512


@pytest.mark.slow
def test_continuations_are_those_of_each_prompt_alone_up_to_the_stop_string(model):
    tokenizer = load_tokenizer("bytes")
    evaluator = Evaluator(model, tokenizer, batch_size=2)
    prompts = [row for row in rows() if len(row) < 80][:3]
    want = [generate(model, [p], max_new_tokens=12, speculative=False)[0] for p in prompts]
    got = evaluator.generate(prompts, max_new_tokens=12)
    # The random model ends no text by itself, and no two of its logits are tied.
    assert got == want
    stop = tokenizer.decode(want[0][4:5])
    stopped = evaluator.generate(prompts, max_new_tokens=12, stop=[stop])
    for tokens, text in zip(stopped, want, strict=True):
        first = next((i for i, t in enumerate(text) if tokenizer.decode([t]) == stop), len(text))
        assert tokens == text[: first + 1]


@pytest.mark.parametrize("batch_size", [1, 2, 0])
def test_a_prompt_that_is_asked_again_gets_another_sample(model, batch_size):
    evaluator = Evaluator(model, load_tokenizer("bytes"), batch_size=batch_size)
    texts = evaluator.generate([[70, 71]] * 6, max_new_tokens=8, temperature=1.0)
    assert len(set(map(tuple, texts))) == 6
    assert evaluator.generate([[70, 71]] * 6, max_new_tokens=8, temperature=1.0) == texts


def test_texts_and_samples_end_with_every_stop_token_of_the_tokenizer(model, monkeypatch):
    tokenizer, ends = load_tokenizer("bytes"), []
    tokenizer.stop_ids = (tokenizer.eos_id, 10)

    def begin(generation):
        ends.append(set(generation._rules.stop_tokens))
        return iter(())

    monkeypatch.setattr(Generation, "__iter__", begin)
    Evaluator(model, tokenizer).generate([[1]], max_new_tokens=1)
    samples(model, tokenizer, [""], max_new_tokens=1, seed=0)
    assert ends == [{tokenizer.eos_id, 10}] * 2


@pytest.mark.slow
def test_scores_and_texts_of_eight_devices_are_those_of_one():
    result = subprocess.run(
        [sys.executable, "tests/split_evaluation.py"],
        cwd=HERE.parent,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert set(found) == {
        "fsdp",
        "expert",
        "context",
        "tensor_fsdp",
        "in a run's mesh",
        "in the caller's mesh",
    }
    for name, (difference, same_text, same_greedy) in found.items():
        assert difference < 1e-4, name  # float32, summed in another order
        assert same_text, name
        assert same_greedy, name
