"""Batches: each token once an epoch, exact resumption, and what a run gets to begin with."""

import collections
import gzip
import itertools
import json
import random
import subprocess

import numpy as np
import pytest

from qwen3next_jax.data.corpus import Document
from qwen3next_jax.data.pipeline import evaluation_batches, load_data, training_batches
from qwen3next_jax.data.tokenizer import train_tokenizer

SHAPE = dict(batch_size=3, sequence_length=16)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    words = ["def", "return", "self", "value", "(x)", "=", "\n", "    ", "é"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(30))) for _ in range(99)]
    return [Document(f"{i}.txt", text) for i, text in enumerate(["", *texts])]


@pytest.fixture(scope="module")
def tokenizer(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    return train_tokenizer([document.text for document in documents], path, vocab_size=300)


def expected_targets(documents, tokenizer):
    return [[*tokenizer.encode(document.text), tokenizer.eos_id] for document in documents]


def targets_of(batches):
    """The targets of weight 1, in order."""
    return [
        target
        for batch in batches
        for target in batch["targets"][batch["loss_weights"] == 1].tolist()
    ]


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(("batch_size", "sequence_length"), [(1, 16), (3, 16), (4, 7), (8, 512)])
def test_evaluation_counts_every_held_out_token_once(
    documents, tokenizer, batch_size, sequence_length
):
    batches = list(evaluation_batches(documents, tokenizer, batch_size=batch_size,
                                      sequence_length=sequence_length))  # fmt: skip
    expected = list(itertools.chain(*expected_targets(documents, tokenizer)))
    assert targets_of(batches) == expected
    rows = -(-len(expected) // sequence_length)
    assert len(batches) == -(-rows // batch_size)
    for batch in batches:
        assert {array.shape for array in batch.values()} == {(batch_size, sequence_length)}
        padding = batch["segment_ids"] == 0
        np.testing.assert_array_equal(batch["loss_weights"], 1.0 - padding)
        assert not any(array[padding].any() for array in batch.values())


def test_a_segment_is_one_run_of_its_row(documents, tokenizer):
    batches = itertools.islice(training_batches(documents, tokenizer, seed=0, **SHAPE), 50)
    for row in itertools.chain.from_iterable(batch["segment_ids"] for batch in batches):
        runs = [segment for segment, _ in itertools.groupby(row)]
        assert len(runs) == len(set(runs))


def epochs_of(documents, tokenizer, seed, count):
    """The first `count` epochs, each as the targets of its documents, in order.

    One row at a time stays in its place.
    """
    size = sum(map(len, expected_targets(documents, tokenizer)))
    stream = []
    batches = training_batches(documents, tokenizer, seed=seed, shuffled_rows=1, **SHAPE)
    while len(stream) < count * size:
        stream += targets_of([next(batches)])
    return [stream[i * size : (i + 1) * size] for i in range(count)]


def test_an_epoch_has_every_document_once_and_no_two_have_the_same_order(documents, tokenizer):
    epochs = epochs_of(documents, tokenizer, seed=0, count=3)
    expected = collections.Counter(map(tuple, expected_targets(documents, tokenizer)))
    for epoch in epochs:
        ends = [i + 1 for i, target in enumerate(epoch) if target == tokenizer.eos_id]
        parts = [tuple(epoch[a:b]) for a, b in itertools.pairwise([0, *ends])]
        assert collections.Counter(parts) == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides_the_order(documents, tokenizer):
    first, again, other = (
        epochs_of(documents, tokenizer, seed=seed, count=1) for seed in (5, 5, 60)
    )
    assert first == again != other


def test_a_single_document_is_repeated(documents, tokenizer):
    document = max(documents, key=lambda document: len(document.text))
    once, twice = epochs_of([document], tokenizer, seed=0, count=2)
    assert once == twice == expected_targets([document], tokenizer)[0]


def test_rows_are_shuffled_by_the_window(documents, tokenizer):
    def rows(seed, shuffled_rows):
        batches = training_batches(
            documents, tokenizer, seed=seed, shuffled_rows=shuffled_rows, **SHAPE
        )
        return [row.tobytes() for _ in range(8) for row in next(batches)["tokens"]]

    packed, shuffled, other = rows(0, 1), rows(0, 6), rows(1, 6)
    for start in range(0, 24, 6):
        window = slice(start, start + 6)
        assert sorted(packed[window]) == sorted(shuffled[window])
        assert packed[window] != shuffled[window]
    assert shuffled != other


# One token a row makes every row end a document or be cut from one; two rows of 700 tokens are a
# good part of an epoch; 64 rows are not a whole number of batches of 3.
@pytest.mark.parametrize(
    ("batch_size", "sequence_length", "shuffled_rows"),
    [(1, 1, 1), (3, 16, 1), (3, 16, 64), (2, 700, 1)],
)
def test_resumption_is_exact_after_any_batch(
    documents, tokenizer, batch_size, sequence_length, shuffled_rows
):
    def start():
        return training_batches(documents, tokenizer, batch_size=batch_size,
                                sequence_length=sequence_length, seed=7,
                                shuffled_rows=shuffled_rows)  # fmt: skip

    iterator, batches, states = start(), [], []
    tokens_an_epoch = sum(map(len, expected_targets(documents, tokenizer)))
    count = 5 + int(2.2 * tokens_an_epoch) // (batch_size * sequence_length)
    for _ in range(count + 4):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    chosen = random.Random(0).sample(range(count), k=min(count, 10))
    for i in {0, 1, *chosen}:
        resumed = start()
        resumed.set_state(json.loads(states[i]))
        assert json.dumps(resumed.get_state()) == states[i]
        assert_same_batches([next(resumed) for _ in range(4)], batches[i : i + 4])


def test_resumption_is_exact_where_documents_fill_rows(tokenizer):
    # Then no document is left over when the state is taken.
    documents = [Document(str(i), chr(ord("a") + i) * 7) for i in range(10)]
    length = len(tokenizer.encode("a" * 7)) + 1
    documents = [d for d in documents if len(tokenizer.encode(d.text)) == length - 1]
    assert len(documents) > 3

    def start():
        return training_batches(documents, tokenizer, batch_size=2,
                                sequence_length=length, seed=0, shuffled_rows=1)  # fmt: skip

    iterator = start()
    for _ in range(15):
        resumed = start()
        resumed.set_state(json.loads(json.dumps(iterator.get_state())))
        assert_same_batches([next(resumed)], [next(iterator)])


def test_a_used_iterator_can_go_back(documents, tokenizer):
    iterator = training_batches(documents, tokenizer, seed=1, **SHAPE)
    next(iterator)
    state = iterator.get_state()
    ahead = [next(iterator) for _ in range(40)]
    iterator.set_state(state)
    assert_same_batches([next(iterator) for _ in range(40)], ahead)


@pytest.fixture
def corpus(tmp_path, documents):
    for document in documents:
        (tmp_path / document.name).write_text(document.text)
    return dict(source="text", path=str(tmp_path / "*.txt"), tokenizer="", holdout_fraction=0.3)


def test_the_first_run_trains_a_tokenizer_and_the_next_reuses_it(corpus, tmp_path):
    path = tmp_path / "run" / "tokenizer.model"
    first = load_data(**corpus, vocab_size=300, trained_tokenizer=path)
    written = path.stat().st_mtime_ns
    second = load_data(**corpus, vocab_size=320, trained_tokenizer=path)
    assert first.tokenizer.vocab_size == second.tokenizer.vocab_size == 300
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"has 300 tokens but model\.vocab_size=299"):
        load_data(**corpus, vocab_size=299, trained_tokenizer=path)


def test_the_tokenizer_never_sees_the_held_out_part(corpus, tmp_path):
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "a")
    train_tokenizer([document.text for document in data.train], tmp_path / "b", vocab_size=300)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_given_tokenizer_is_used(corpus, tmp_path, documents):
    train_tokenizer([document.text for document in documents], tmp_path / "given", vocab_size=280)
    corpus["tokenizer"] = str(tmp_path / "given")
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "unused")
    assert data.tokenizer.vocab_size == 280
    assert not (tmp_path / "unused").exists()
    corpus["tokenizer"] = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "unused")


def test_bytes_and_gzip_are_of_the_held_out_texts(corpus, tmp_path):
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "tokenizer")
    held_out = b"".join((tmp_path / document.name).read_bytes() for document in data.held_out)
    assert data.held_out_bytes == len(held_out) > 0
    command = subprocess.run(["gzip", "-9"], input=held_out, capture_output=True, check=True)
    assert gzip.decompress(command.stdout) == held_out
    # Both write the same format; a byte or two of slack for another implementation's choices.
    bits = data.gzip_bits_per_byte() * len(held_out)
    assert bits == pytest.approx(8 * len(command.stdout), abs=16)
