"""Drafts that stood are counted by place and domain, each row's own passes and no others."""

import numpy as np
import pytest
from absl import logging
from oracles import random_model, small_config

from qwen3next_jax.data.sources import Record
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.evaluation.evaluator import Evaluator
from qwen3next_jax.evaluation.speculation import beginnings, speculation
from qwen3next_jax.inference.decode import Generation

TOKENIZER = load_tokenizer("bytes")
DOMAINS = {
    "short": [Record(name="s", text="no"), Record(name="a", text="abcdefghij" * 2)],
    "long": [Record(name=str(i), text=chr(97 + i) * (30 + i)) for i in range(4)],
}


@pytest.mark.slow
def test_counts_are_the_sums_over_prompts_alone():
    # A model that says little else than one token, which its MTP module guesses now and then.
    model = random_model(small_config(vocab_size=264, mtp_steps=1), scale=0.6, seed=3)
    options = dict(prompts=3, prompt_length=16, new_tokens=20, drafts=2)
    got = speculation(Evaluator(model, TOKENIZER), DOMAINS, **options)
    drafted, accepted = 0, np.zeros(2, int)
    for text in ("abcdefghij" * 2, *(chr(97 + i) * (30 + i) for i in range(3))):
        prompt = [TOKENIZER.bos_id, *text.encode()][:16]
        alone = Generation(
            model, [prompt], max_new_tokens=20, stop_tokens=TOKENIZER.stop_ids, speculative=2
        )
        for _ in alone:
            pass
        drafted += alone.passes
        accepted += alone.accepted
    assert got["drafted"] == drafted
    np.testing.assert_allclose(got["acceptance"], accepted / drafted)
    np.testing.assert_allclose(got["tokens_per_pass"], 1 + accepted.sum() / drafted)
    assert sum(part["drafted"] for part in got["domains"].values()) == drafted


def test_a_domain_of_short_texts_is_left_out_and_named(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    domains = {"tweets": [Record(name="t", text="no")], **DOMAINS}
    found = beginnings(domains, TOKENIZER, count=2, length=16)
    texts = {name: [TOKENIZER.decode(tokens[1:]) for tokens in x] for name, x in found.items()}
    assert texts == {"short": ["abcdefghijabcde"], "long": ["a" * 15, "b" * 15]}
    (warning,) = said
    assert warning.startswith("No document of tweets has more than 16 tokens")


def test_a_model_or_texts_that_cannot_be_used_are_refused():
    without = Evaluator(random_model(small_config(vocab_size=264)), TOKENIZER)
    with pytest.raises(ValueError, match=r"this model has none \(mtp_steps=0\)"):
        speculation(without, DOMAINS)
    model = random_model(small_config(vocab_size=264, mtp_steps=1))
    with pytest.raises(ValueError, match="No document of short, long has more than 64 tokens"):
        speculation(Evaluator(model, TOKENIZER), DOMAINS)
