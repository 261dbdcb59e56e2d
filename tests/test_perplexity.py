"""Perplexity and bits per byte against plain sums over all tokens."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hf_tokenizer import make_tokenizer_json
from oracles import quick_jit, random_model, small_config
from small_run import small_config as small_run_config
from small_run import write_corpus

from qwen3next_jax.data.corpus import load_data
from qwen3next_jax.data.sources import Record
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.evaluation import perplexity as perplexity_module
from qwen3next_jax.evaluation.evaluator import Evaluator, RowScores
from qwen3next_jax.evaluation.perplexity import (
    document_perplexity,
    perplexity,
    perplexity_in_training,
)
from qwen3next_jax.parallel.processes import Stopped
from qwen3next_jax.training.loss import complete_batch


def test_bits_per_byte_are_the_plain_sum_over_all_tokens_and_batches():
    model = random_model(small_config(mtp_steps=1))
    rows = np.random.default_rng(0).integers(1, 61, (3, 2, 20))
    segments = np.ones((3, 2, 20), np.int32)
    segments[2, 1, 5:] = 0  # a batch that is mostly padding counts by its tokens
    batches = [
        complete_batch(jnp.asarray(t), jnp.asarray(s)) for t, s in zip(rows, segments, strict=True)
    ]
    got = perplexity(model, batches, text_bytes=333)

    nats = count = 0
    forward = quick_jit(lambda tokens, segments: model(tokens, segments))
    for batch in batches:
        logits = np.asarray(forward(batch["tokens"], batch["segment_ids"]), np.float64)
        log_norms = np.log(np.exp(logits).sum(-1))
        for b, t in np.argwhere(np.asarray(batch["loss_weights"]) > 0):
            nats += log_norms[b, t] - logits[b, t, batch["targets"][b, t]]
            count += 1
    # float32 sums against float64 ones
    np.testing.assert_allclose(got["eval_ce"], nats / count, rtol=1e-5)
    np.testing.assert_allclose(got["eval_bits_per_byte"], nats / math.log(2) / 333, rtol=1e-5)


def test_an_evaluation_in_training_takes_the_rows_of_a_micro_batch(tmp_path, monkeypatch):
    config = small_run_config(
        write_corpus(tmp_path / "texts"),
        train__global_batch_size=8,
        train__gradient_accumulation_steps=4,
    )
    data = load_data(
        **dataclasses.asdict(config.data),
        vocab_size=config.model.vocab_size,
        trained_tokenizer=tmp_path / "tokenizer.model",
    )
    shapes = set()

    def losses(graph, params, batch, chunk):
        shapes.add(batch["tokens"].shape)
        return np.log(2) * batch["loss_weights"], 0  # a bit for each token

    monkeypatch.setattr(perplexity_module, "_losses", lambda dtype: losses)
    result = perplexity_in_training(config.train, data)(random_model(small_config()))
    assert shapes == {(2, config.train.sequence_length)}
    with pytest.raises(Stopped):
        perplexity_in_training(config.train, data, lambda: True)(random_model(small_config()))
    np.testing.assert_allclose(result["eval_ce"], np.log(2), rtol=1e-6)
    # All of the held-out text is in these rows: at least a token for each of its documents' ends.
    tokens = result["eval_bits_per_byte"] * data.held_out_bytes
    assert tokens == pytest.approx(round(tokens))
    assert tokens > len(data.held_out)


def test_documents_are_told_by_length_and_tokens_by_position():
    model = random_model(small_config(vocab_size=264))
    tokenizer = load_tokenizer("bytes")
    texts = {"a": ["x" * 3, "hello, world" * 4], "b": ["日本" * 5, "y" * 100]}
    domains = {
        name: [Record(name=text, text=text) for text in part] for name, part in texts.items()
    }
    length = 64
    got = document_perplexity(Evaluator(model, tokenizer), domains, length=length)

    forward = quick_jit(model)
    nats, positions, by_text = 0.0, {}, {}
    for text in (*texts["a"], *texts["b"]):
        ids = [tokenizer.bos_id, *text.encode(), tokenizer.eos_id]
        own = []
        for start in range(0, len(ids) - 1, length):
            piece = ids[start : start + length + 1]
            padded = np.pad(piece, (0, length + 1 - len(piece)))  # nothing before it sees that
            logits = np.asarray(forward(jnp.asarray([padded])), np.float64)[0]
            for i, target in enumerate(piece[1:]):
                own.append(np.log(np.exp(logits[i]).sum()) - logits[i, target])
                positions.setdefault(int(math.log2(i + 1)), []).append(own[-1])
        by_text[text] = own
        nats += sum(own)
    tokens = sum(map(len, by_text.values()))
    size = sum(len(text.encode()) for text in by_text)
    assert (got["documents"], got["tokens"], got["cut_documents"]) == (4, tokens, 1)
    # float32 sums against float64 ones
    np.testing.assert_allclose(got["ce"], nats / tokens, rtol=1e-5)
    np.testing.assert_allclose(got["bits_per_byte"], nats / math.log(2) / size, rtol=1e-5)
    assert [(p["from"], p["to"], p["tokens"]) for p in got["by_position"]] == [
        (2**i, 2 ** (i + 1), len(positions[i])) for i in sorted(positions)
    ]
    for part, i in zip(got["by_position"], sorted(positions), strict=True):
        np.testing.assert_allclose(part["ce"], np.mean(positions[i]), rtol=1e-5)
    # 4, 49, 31 and 101 tokens, EOS among them.
    assert [(p["from"], p["documents"]) for p in got["by_length"]] == [
        (4, 1),
        (16, 1),
        (32, 1),
        (64, 1),
    ]
    np.testing.assert_allclose(got["by_length"][3]["ce"], np.mean(by_text["y" * 100]), rtol=1e-5)
    np.testing.assert_allclose(
        got["by_length"][3]["bits_per_byte"],
        np.sum(by_text["y" * 100]) / math.log(2) / 100,
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        got["domains"]["a"]["ce"],
        np.mean([x for text in texts["a"] for x in by_text[text]]),
        rtol=1e-5,
    )


def test_a_limit_counts_the_documents_of_each_domain_that_can_be_used():
    model = random_model(small_config(vocab_size=264))
    domains = {
        name: [Record(name=text, text=text) for text in ("", "first", "second")] for name in "ab"
    }
    got = document_perplexity(
        Evaluator(model, load_tokenizer("bytes")), domains, limit=1, on_error="skip"
    )
    # Of each domain the first that is not empty, and EOS.
    assert (got["documents"], got["tokens"]) == (2, 2 * (len("first") + 1))


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}"
    "{% else %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% endif %}"
    "{% endfor %}"
)


def test_of_a_chat_the_answers_count(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer_json(tmp_path, chat_template=TEMPLATE))
    messages, parts = [], []  # the text in parts, of which every second one is learnt
    for question, answer in (("a", "hi"), ("b", "def f(x)")):
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        parts += [f"<|im_start|>user\n{question}<|im_start|>assistant\n", f"{answer}<|im_end|>\n"]
    model = random_model(small_config(vocab_size=tokenizer.vocab_size))
    records = {"chats": [Record(name="a", messages=messages)]}
    got = document_perplexity(Evaluator(model, tokenizer), records)

    ids = [tokenizer.encode(part, parse_special=True) for part in parts]
    whole = [i for part in ids for i in part]
    assert whole == tokenizer.encode("".join(parts), parse_special=True)
    assert whole[-1] != tokenizer.eos_id
    logits = np.asarray(quick_jit(model)(jnp.asarray([whole])), np.float64)[0]
    learnt = np.repeat([i % 2 for i in range(len(ids))], [len(part) for part in ids])
    losses = [
        np.log(np.exp(logits[at - 1]).sum()) - logits[at - 1, whole[at]]
        for at in np.flatnonzero(learnt)
    ]
    assert got["tokens"] == len(losses)
    np.testing.assert_allclose(got["ce"], np.mean(losses), rtol=1e-5)
    size = len("hi\ndef f(x)\n")
    np.testing.assert_allclose(got["bits_per_byte"], np.sum(losses) / math.log(2) / size, rtol=1e-5)


def test_what_counts_of_a_document_is_the_same_where_it_is_cut(monkeypatch):
    """By a model to which a token costs as many nats as its number."""

    def score(_, rows):
        losses = [np.array(row[1:], np.float32) for row in rows]
        return [RowScores(x, x) for x in losses]

    monkeypatch.setattr(Evaluator, "score", score)
    ids, weights = np.arange(100, 111, dtype=np.int32), np.zeros(10, np.float32)
    weights[[2, 7, 9]] = 1
    document = {"tokens": ids[:-1], "targets": ids[1:], "loss_weights": weights}
    records = {"a": [Record(name="a", tokens=document)]}
    evaluator = Evaluator(random_model(small_config()), load_tokenizer("bytes"))
    got = document_perplexity(evaluator, records, length=4)  # in three pieces
    assert (got["tokens"], got["cut_documents"]) == (3, 1)
    np.testing.assert_allclose(got["ce"], np.mean([103, 108, 110]))


def test_a_length_beyond_the_context_is_refused():
    model = random_model(small_config(vocab_size=264))
    with pytest.raises(ValueError, match="length=513 exceeds the model's context of 512 tokens"):
        document_perplexity(Evaluator(model, load_tokenizer("bytes")), {}, length=513)
