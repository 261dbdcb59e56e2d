"""Retrieval from long texts, by the text's length and the depth of the sentence to retrieve.

Five tasks of RULER's families (Hsieh et al., arXiv:2404.06654), made of a small vocabulary, so that
longer texts differ in length only and every answer consists of single words:

- `niah_single`: a sentence binds a word to a key; the question asks for the word.
- `niah_multikey`: four keys, each with its word; the question asks for one, the others distract.
- `niah_multivalue`: one key with four words; the question asks for all.
- `variable_tracking`: a word is put into a box and copied from box to box; a second word is copied
  through other boxes. The question asks for the boxes with the first word.
- `common_words`: a list of words, three of them ten times as frequent as any other; the question
  asks for the three.

*Depth* is the position, from 0 to 1, of the first sentence to retrieve; further ones are spread
evenly after it. Common words are everywhere, and their depth is 0. The *score* is the share of the
expected words that the model's greedy answer contains.

A length is that of the prompt and the room for the answer together. Beyond the context that the
model was trained on, YaRN is applied, with the least sufficient power of two as its factor.
"""

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from flax import nnx

from qwen3next_jax.config import ModelConfig, require_known
from qwen3next_jax.data.chat import render_chat
from qwen3next_jax.data.tokenizer import Tokenizer, encode_prompt
from qwen3next_jax.evaluation.evaluator import Evaluator
from qwen3next_jax.model.decoder import Qwen3Next

KEYS = (
    "acorn", "anchor", "apron", "badge", "barrel", "basket", "beacon", "bell", "blanket",
    "bottle", "bridge", "brush", "bucket", "button", "cabin", "candle", "canoe", "carpet",
    "castle", "chimney", "circle", "coat", "comb", "compass", "cradle", "crown", "curtain",
    "desk", "drum", "engine", "fence", "flag", "flute", "fork", "garden", "glove", "hammer",
    "harbor", "hat", "helmet", "jacket", "kettle", "key", "ladder", "lamp", "lantern",
    "mirror", "needle",
)  # fmt: skip
WORDS = (
    "almond", "amber", "barley", "birch", "cedar", "cherry", "clay", "clover", "cobalt",
    "copper", "coral", "cotton", "daisy", "emerald", "fern", "flint", "ginger", "granite",
    "hazel", "honey", "indigo", "iron", "ivory", "jade", "jasmine", "lemon", "lilac", "lime",
    "linen", "maple", "marble", "mint", "moss", "nutmeg", "olive", "opal", "orange", "pearl",
    "pepper", "pine", "plum", "quartz", "raven", "rose", "ruby", "saffron", "silver", "walnut",
)  # fmt: skip
NOISE = (
    "Rain fell on the roof.", "The train was late.", "A dog slept by the door.",
    "Nobody knew the way.", "The wind came from the sea.", "Bread was on the table.",
    "They walked until dark.", "The lights went out again.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Question:
    """A text without its noise, and a question about it.

    Attributes:
      found: sentences to retrieve, in order; the first is placed at the depth, the others after it.
      distractors: sentences of the same kind, placed anywhere.
      question: question after the text, with the beginning of the answer.
      answers: expected words.
      noise: sentences that the text is filled up with.
    """

    found: tuple[str, ...]
    distractors: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    noise: tuple[str, ...] = NOISE


def long_context(
    evaluator: Evaluator,
    *,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (),
    depths: int = 5,
    samples: int = 4,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Asks the questions.

    Args:
      evaluator: the model.
      tasks: names of `TASKS`; (): all.
      lengths: lengths in tokens; (): powers of two from 1024 (or a quarter of a shorter context) to
        the model's context.
      depths: number of depths, evenly spaced from 0 to 1.
      samples: number of questions for each task, length and depth.
      chat: whether to ask as the user's message in the model's chat template.
      seed: PRNG seed of the questions; those of a cell do not depend on the other cells.

    Returns:
      `score`, the mean over all cells, and for each task its mean under its name; `cells`, a list
      of {task, length, depth, score, yarn_factor}; `examples`, for each task one {prompt, answers,
      output} of the shortest length.

    Raises:
      ValueError: a task is unknown, a length is too short for a question, or a length exceeds the
        context of a model whose config already has YaRN.
    """
    tasks = tuple(tasks) or tuple(TASKS)
    config = evaluator.model.config
    check_questions(
        config,
        evaluator.tokenizer,
        tasks=tasks,
        lengths=lengths,
        depths=depths,
        samples=samples,
        chat=chat,
        seed=seed,
    )
    room = _answer_room(tasks, evaluator.tokenizer)
    cells: list[dict[str, Any]] = []
    examples: dict[str, Any] = {}
    for length in sorted(lengths or _lengths(config)):
        factor = yarn_factor(config, length)
        if factor:
            logging.info(
                "%d tokens lie beyond the %d that the model was trained on: YaRN, factor %d",
                length,
                config.max_position_embeddings,
                factor,
            )
        here = evaluator.with_model(with_yarn(evaluator.model, factor)) if factor else evaluator
        asked = _asked(tasks, length, depths=depths, samples=samples, seed=seed)
        prompts = [
            fit(question, depth, length - room, evaluator.tokenizer, chat=chat)
            for _, depth, question in asked
        ]
        outputs = here.generate([tokens for tokens, _ in prompts], max_new_tokens=room - 1)
        scores: dict[tuple[str, float], list[float]] = {}
        for (task, depth, question), (_, text), output in zip(asked, prompts, outputs, strict=True):
            written = evaluator.tokenizer.decode(output)
            scores.setdefault((task, depth), []).append(score(written, question.answers))
            example = {"prompt": text, "answers": list(question.answers), "output": written}
            examples.setdefault(task, example)
        cells += [
            {
                "task": task,
                "length": length,
                "depth": round(depth, 4),
                "score": float(np.mean(values)),
                "yarn_factor": factor,
            }
            for (task, depth), values in scores.items()
        ]
        means = {
            t: np.mean([c["score"] for c in cells if (c["task"], c["length"]) == (t, length)])
            for t in tasks
        }
        summary = ", ".join(f"{task} {mean:.2f}" for task, mean in means.items())
        logging.info("Long context, %d tokens: %s", length, summary)
    by_task = {t: float(np.mean([c["score"] for c in cells if c["task"] == t])) for t in tasks}
    mean = float(np.mean([c["score"] for c in cells]))
    return {"score": mean, **by_task, "cells": cells, "examples": examples}


def check_questions(
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (),
    depths: int = 5,
    samples: int = 4,
    chat: bool = False,
    seed: int = 0,
) -> None:
    """Raises what `long_context` would raise with these arguments, without needing a model."""
    tasks = tuple(tasks) or tuple(TASKS)
    require_known("tasks of long_context", tasks, tuple(TASKS))
    room = _answer_room(tasks, tokenizer)
    for length in sorted(lengths or _lengths(config)):
        yarn_factor(config, length)
        for _, depth, question in _asked(tasks, length, depths=depths, samples=samples, seed=seed):
            _check_room(question, depth, length - room, tokenizer, chat)


def _lengths(config: ModelConfig) -> list[int]:
    """The default lengths."""
    longest = config.context_length
    powers = (1 << i for i in range(longest.bit_length()))
    return [n for n in powers if min(1024, longest // 4) <= n <= longest]


def _asked(
    tasks: Sequence[str], length: int, *, depths: int, samples: int, seed: int
) -> list[tuple[str, float, Question]]:
    """All questions of a length, each with its task and depth."""
    return [
        (task, float(depth), ask(task, depth, length=length, sample=sample, seed=seed))
        for task in tasks
        for depth in (np.linspace(0, 1, depths) if task != "common_words" else [0.0])
        for sample in range(samples)
    ]


def ask(task: str, depth: float, *, length: int, sample: int, seed: int) -> Question:
    """The question of a task, which depends on these arguments only."""
    rng = np.random.default_rng(
        [seed, zlib.crc32(task.encode()), length, round(float(depth) * 10_000), sample]
    )
    return TASKS[task](rng)


def fit(
    question: Question, depth: float, length: int, tokenizer: Tokenizer, *, chat: bool = False
) -> tuple[list[int], str]:
    """The tokens and the text of a question, with as much noise as fits into `length` tokens.

    Raises:
      ValueError: the question does not fit even without noise.
    """

    def prompt(sentences: int) -> tuple[list[int], str]:
        text = _write(question, depth, sentences)
        return _tokens(text, question.question, tokenizer, chat), text + question.question

    _check_room(question, depth, length, tokenizer, chat)
    # Every sentence adds tokens, so the most that fit are found by bisection.
    fits, too_many = 0, length
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(prompt(middle)[0]) <= length:
            fits = middle
        else:
            too_many = middle
    return prompt(fits)


def _check_room(
    question: Question, depth: float, length: int, tokenizer: Tokenizer, chat: bool
) -> None:
    """Raises a ValueError if a question does not fit into `length` tokens even without noise."""
    needed = len(_tokens(_write(question, depth, 0), question.question, tokenizer, chat))
    if needed > length:
        raise ValueError(
            f"A question of {needed} tokens does not fit into the {max(length, 0)} that the answer "
            f"leaves; give lengths greater by at least {needed - length}"
        )


def score(output: str, answers: Sequence[str]) -> float:
    """The share of the expected words that occur in the output."""
    words = set(re.findall(r"\w+", output.lower()))
    return sum(answer in words for answer in answers) / len(answers)


def yarn_factor(config: ModelConfig, length: int) -> int:
    """The YaRN factor that a model needs for a length; 0 if it needs none.

    Raises:
      ValueError: the length exceeds the context of a model whose config already has YaRN.
    """
    if length <= config.context_length:
        return 0
    if config.rope_scaling is not None:
        raise ValueError(
            f"A length of {length} exceeds the context of {config.context_length} tokens, which "
            "the model has by rope_scaling (YaRN) already; raise its factor or ask for less"
        )
    return 1 << (-(-length // config.max_position_embeddings) - 1).bit_length()


def with_yarn(model: Qwen3Next, factor: int) -> Qwen3Next:
    """The model with its context extended by YaRN; the parameters are shared."""
    config = dataclasses.replace(model.config, rope_scaling=model.config.yarn(float(factor)))
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "config"):
            module.config = config
    return model


def magic_word_is(key: str, word: str) -> str:
    """The sentence that binds a word to a key."""
    return f"The magic word of {key} is {word}."


def which_magic_word(key: str) -> str:
    """The question for the word bound to a key, with the beginning of the answer."""
    return f"\nWhat is the magic word of {key}?\nThe magic word of {key} is"


def _answer_room(tasks: Sequence[str], tokenizer: Tokenizer) -> int:
    """Tokens reserved for an answer, the same for all tasks: twice the longest, and a few."""
    longest = 0
    for task in tasks:
        for i in range(8):
            answers = TASKS[task](np.random.default_rng(i)).answers
            longest = max(longest, len(tokenizer.encode(" " + ", ".join(answers))))
    return 2 * longest + 6


def _write(question: Question, depth: float, sentences: int) -> str:
    """The text: so many sentences of noise, with the question's sentences among them."""
    rng = np.random.default_rng(zlib.crc32(repr((question, depth)).encode()))
    first = round(depth * sentences)
    n = len(question.found)
    places = [(first + (sentences - first) * i // n, i) for i in range(n)]
    at: dict[int, list[str]] = {}
    for place, i in places:
        at.setdefault(place, []).append(question.found[i])
    for distractor in question.distractors:
        there = at.setdefault(int(rng.integers(sentences + 1)), [])
        there.insert(int(rng.integers(len(there) + 1)), distractor)
    parts = []
    for i in range(sentences + 1):
        parts += at.get(i, [])
        if i < sentences:
            parts.append(question.noise[i % len(question.noise)])
    return " ".join(parts)


def _tokens(text: str, question: str, tokenizer: Tokenizer, chat: bool) -> list[int]:
    if not chat:
        return encode_prompt(tokenizer, text + question)
    # The beginning of the answer is the assistant's, so it follows the rendered chat.
    asked, _, begun = question.rpartition("\n")
    rendered = render_chat(
        [{"role": "user", "content": text + asked}],
        tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens,
    )
    return tokenizer.encode(rendered + begun, parse_special=True)


def _bound_words(rng: np.random.Generator, *, keys: int) -> Question:
    names, values = rng.permutation(KEYS)[:keys], rng.permutation(WORDS)[:keys]
    needle, *others = (magic_word_is(k, v) for k, v in zip(names, values, strict=True))
    return Question((needle,), tuple(others), which_magic_word(names[0]), (str(values[0]),))


def _multivalue(rng: np.random.Generator) -> Question:
    name, values = rng.choice(KEYS), rng.permutation(WORDS)[:4]
    return Question(
        tuple(f"A magic word of {name} is {value}." for value in values),
        (),
        f"\nWhat are the four magic words of {name}?\nThe four magic words of {name} are",
        tuple(map(str, values)),
    )


def _variable_tracking(rng: np.random.Generator) -> Question:
    boxes, (word, other) = rng.permutation(KEYS)[:8], rng.permutation(WORDS)[:2]

    def chain(names, word):
        yield f"The {names[0]} box holds {word}."
        for before, name in itertools.pairwise(names):
            yield f"The {name} box holds what the {before} box holds."

    return Question(
        tuple(chain(boxes[:4], word)),
        tuple(chain(boxes[4:], other)),
        f"\nWhich four boxes hold {word}?\nThe four boxes that hold {word} are",
        tuple(map(str, boxes[:4])),
    )


def _common_words(rng: np.random.Generator) -> Question:
    words = rng.permutation(WORDS)
    common, rare = words[:3], words[3:23]
    # In groups of five, so that at any length the common ones are the most frequent.
    noise = np.concatenate(
        [rng.permutation([*common, *rare[i : i + 2]]) for i in range(0, len(rare), 2)]
    )
    return Question(
        (),
        (),
        "\nWhat are the three most frequent words?\nThe three most frequent words are",
        tuple(map(str, common)),
        tuple(map(str, noise)),
    )


TASKS: dict[str, Callable[[np.random.Generator], Question]] = {
    "niah_single": functools.partial(_bound_words, keys=1),
    "niah_multikey": functools.partial(_bound_words, keys=4),
    "niah_multivalue": _multivalue,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}
