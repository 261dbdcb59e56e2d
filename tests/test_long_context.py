"""The questions are what they say they are, and a score counts the words that were asked for."""

import collections
import itertools
import re

import numpy as np
import pytest
from hf_tokenizer import CHATML
from oracles import random_model, small_config

from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.evaluation.evaluator import Evaluator
from qwen3next_jax.evaluation.long_context import (
    KEYS,
    TASKS,
    WORDS,
    ask,
    fit,
    long_context,
    score,
    with_yarn,
    yarn_factor,
)

TOKENIZER = load_tokenizer("bytes")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [700, 3000])
def test_a_prompt_fills_its_length_and_holds_its_answers_at_its_depth(task, depth, length):
    question = ask(task, depth, length=length, sample=0, seed=0)
    tokens, text = fit(question, depth, length, TOKENIZER)
    longest = max(len(TOKENIZER.encode(" " + noise)) for noise in question.noise)
    assert length - longest < len(tokens) <= length
    assert text.endswith(question.question)
    body = text.removesuffix(question.question)
    assert all(answer in re.findall(r"\w+", body) for answer in question.answers)
    if question.found:
        places = [body.index(found) for found in question.found]
        assert places == sorted(places)
        # A sentence more or less, and distractors that stand before or behind.
        room = longest + len(" ".join(question.distractors))
        first = places[0] - depth * (len(body) - len(" ".join(question.found)))
        assert abs(first) <= room
        # From the first one on, all stand equally far apart.
        share = (len(body) - places[0]) / len(places)
        assert all(abs(gap - share) <= room for gap in np.diff(places))


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_follow_from_the_text_alone(task):
    for sample in range(5):
        question = ask(task, 0.3, length=2000, sample=sample, seed=1)
        _, text = fit(question, 0.3, 2000, TOKENIZER)
        asked = text.splitlines()[-2]
        body = text[: text.index(asked)]
        if task == "common_words":
            words = body.split()
            by_count = sorted(set(words), key=words.count)
            assert set(by_count[-3:]) == set(question.answers)
            assert words.count(by_count[-3]) > 5 * words.count(by_count[-4])
        elif task == "variable_tracking":
            held = dict(re.findall(r"The (\w+) box holds (\w+)\.", body))
            copies = re.findall(r"The (\w+) box holds what the (\w+) box holds\.", body)
            for _ in copies:
                held |= {new: held[old] for new, old in copies if old in held}
            word = re.search(r"hold (\w+)\?", asked)[1]
            assert {box for box, held in held.items() if held == word} == set(question.answers)
        else:
            key = re.search(r"of (\w+)\?", asked)[1]
            found = re.findall(rf"magic word of {key} is (\w+)\.", body)
            assert found == list(question.answers)


def test_the_common_words_are_the_most_frequent_at_any_length():
    for sample in range(20):
        question = ask("common_words", 0.0, length=256, sample=sample, seed=1)
        assert len(question.noise) == 50
        for length in range(10, 120):
            counts = collections.Counter(itertools.islice(itertools.cycle(question.noise), length))
            first, second = counts.most_common(4)[2:]
            assert {word for word, _ in counts.most_common(3)} == set(question.answers)
            assert first[1] > second[1]


def test_questions_depend_on_task_length_depth_sample_and_seed_alone():
    given = dict(length=1000, sample=0, seed=0)
    question = ask("niah_single", 0.5, **given)
    assert ask("niah_single", 0.5, **given) == question
    for change in (dict(length=2000), dict(sample=1), dict(seed=1)):
        assert ask("niah_single", 0.5, **{**given, **change}) != question
    assert ask("niah_single", 0.25, **given) != question


def test_words_are_different_and_none_is_part_of_the_noise():
    assert len({*KEYS, *WORDS}) == len(KEYS) + len(WORDS) == 96
    noise = " ".join(ask("niah_single", 0.0, length=9, sample=0, seed=0).noise).lower()
    assert not {*KEYS, *WORDS} & set(re.findall(r"\w+", noise))


def test_a_score_is_the_share_of_the_expected_words():
    assert score(" amber, Plum.", ["amber", "plum", "fern", "iron"]) == 0.5
    assert score("ambers plumb", ["amber", "plum"]) == 0  # other words


def test_a_length_without_room_for_the_question_is_refused():
    question = ask("niah_multivalue", 0.0, length=64, sample=0, seed=0)
    with pytest.raises(ValueError, match="does not fit into the 64 that the answer leaves; give"):
        fit(question, 0.0, 64, TOKENIZER)


def test_lengths_beyond_training_get_the_least_power_of_two_as_yarn_factor():
    model = random_model(small_config())
    assert [yarn_factor(model.config, n) for n in (512, 513, 1024, 1025, 16384)] == [0, 2, 2, 4, 32]
    extended = with_yarn(model, 4)
    assert extended.config.context_length == 2048
    # The rotary embedding is told by the config that each attention layer holds.
    assert extended.groups.layers[1].self_attn.config.rope_scaling["factor"] == 4
    assert model.config.rope_scaling is None
    assert model.groups.layers[1].self_attn.config.rope_scaling is None
    with pytest.raises(
        ValueError, match="2049 exceeds the context of 2048 tokens, which the model"
    ):
        yarn_factor(extended.config, 2049)


def test_a_length_that_is_too_long_is_refused_before_shorter_ones_are_read(monkeypatch):
    def generate(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(Evaluator, "generate", generate)
    evaluator = Evaluator(with_yarn(random_model(small_config()), 4), TOKENIZER)
    with pytest.raises(ValueError, match="2049 exceeds the context"):
        long_context(evaluator, tasks=["niah_single"], lengths=[512, 2049], depths=1, samples=1)


def test_scores_are_of_what_was_written_for_their_own_prompts(tmp_path, monkeypatch):
    """By a model that reads: it finds words near the beginning, and all but one common word."""
    seen = []

    def generate(evaluator, prompts, *, max_new_tokens):
        factor = (evaluator.model.config.rope_scaling or {}).get("factor", 0)
        for prompt in prompts:
            text = TOKENIZER.decode(prompt)
            seen.append((factor, len(prompt) + max_new_tokens, text))
            body = text[: text.rindex("\nWhat")]
            if "frequent" in text:
                words = re.findall(r"\w+", body)
                answer = ", ".join(sorted(WORDS, key=words.count)[-2:])
            else:
                needle = re.search(r"magic word of \w+ is (\w+)\.", body)
                answer = needle[1] if needle.start() < len(body) / 2 else "nothing"
            yield TOKENIZER.encode(" " + answer)[:max_new_tokens]

    monkeypatch.setattr(Evaluator, "generate", generate)
    evaluator = Evaluator(random_model(small_config(max_position_embeddings=1024)), TOKENIZER)
    asked = dict(tasks=["niah_single", "common_words"], depths=2, samples=2)
    found = long_context(evaluator, **asked, lengths=[2048, 1024])
    # A sentence more would not have fitted.
    assert {(length, factor) for factor, length, _ in seen} <= {
        (n - i, 0 if n == 1024 else 2) for n in (1024, 2048) for i in range(1, 40)
    }
    scores = {(c["task"], c["length"], c["depth"]): c["score"] for c in found["cells"]}
    for length in (1024, 2048):
        assert scores["niah_single", length, 0.0] == 1
        assert scores["niah_single", length, 1.0] == 0
        assert scores["common_words", length, 0.0] == pytest.approx(2 / 3)
    assert (found["niah_single"], found["common_words"]) == pytest.approx((1 / 2, 2 / 3))
    assert found["score"] == pytest.approx((1 + 0 + 2 / 3) / 3)

    # Lengths are powers of two from a quarter of a short context; a chat has its template's marks.
    (tmp_path / "template").write_text(CHATML)
    chatting = load_tokenizer("bytes", chat_template=tmp_path / "template")
    evaluator, asked["tasks"] = Evaluator(evaluator.model, chatting), ["niah_single"]
    found = long_context(evaluator, **asked, chat=True)
    assert [c["length"] for c in found["cells"]] == [256, 256, 512, 512, 1024, 1024]
    assert all(text.startswith("<|im_start|>user\n") for *_, text in seen[-12:])


@pytest.mark.slow
def test_every_task_length_and_depth_has_a_cell_and_unknown_tasks_the_nearest_names():
    model = random_model(small_config(vocab_size=264), scale=0.3)
    evaluator = Evaluator(model, TOKENIZER)
    result = long_context(
        evaluator, tasks=["niah_single", "common_words"], lengths=[640, 512], depths=2, samples=1
    )
    assert len(TOKENIZER.encode(result["examples"]["common_words"]["prompt"])) < 512
    places = [(c["task"], c["length"], c["depth"], c["yarn_factor"]) for c in result["cells"]]
    assert places == [
        ("niah_single", 512, 0.0, 0),
        ("niah_single", 512, 1.0, 0),
        ("common_words", 512, 0.0, 0),
        ("niah_single", 640, 0.0, 2),
        ("niah_single", 640, 1.0, 2),
        ("common_words", 640, 0.0, 2),
    ]
    scores = [cell["score"] for cell in result["cells"]]
    np.testing.assert_allclose(result["score"], np.mean(scores))
    with pytest.raises(ValueError, match=r"'niah_singel' \(did you mean 'niah_single'"):
        long_context(evaluator, tasks=["niah_singel"])
