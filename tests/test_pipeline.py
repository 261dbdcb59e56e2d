"""Batches: each record once an epoch, and exact resumption on any hosts."""

import collections
import functools
import itertools
import json
import random
import re

import numpy as np
import pytest
from corpora import make_texts

from qwen3next_jax.data.corpus import Data, TrainingPart
from qwen3next_jax.data.pipeline import (
    _ShardedBatches,
    evaluation_batches,
    input_metrics,
    training_batches,
)
from qwen3next_jax.data.sources import Record
from qwen3next_jax.data.train_tokenizer import train_tokenizer

SHAPE = dict(batch_size=3, sequence_length=16)


def records_of(texts):
    return [Record(name=f"{i}.txt", text=text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def texts():
    return make_texts()


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    return train_tokenizer(texts, path, vocab_size=300)


@pytest.fixture(scope="module")
def data_of(tokenizer):
    def build(texts, **changes):
        part = TrainingPart("texts", records_of(texts))
        return Data(train=[part], held_out=records_of(texts), tokenizer=tokenizer, **changes)

    return build


def expected_targets(texts, tokenizer):
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


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


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("window_rows", [1, 3, 128])
@pytest.mark.parametrize(("batch_size", "sequence_length"), [(1, 16), (3, 16), (4, 7), (8, 512)])
def test_evaluation_counts_every_held_out_token_once(
    texts, data_of, tokenizer, batch_size, sequence_length, window_rows, packing
):
    data = data_of(texts, packing=packing, window_rows=window_rows)
    batches = list(evaluation_batches(data, batch_size=batch_size, sequence_length=sequence_length))
    expected = list(itertools.chain(*expected_targets(texts, tokenizer)))
    if packing == "concatenate":
        assert targets_of(batches) == expected
        rows = -(-len(expected) // sequence_length)
        assert len(batches) == -(-rows // batch_size)
    assert collections.Counter(targets_of(batches)) == collections.Counter(expected)
    for batch in batches:
        assert {array.shape for array in batch.values()} == {(batch_size, sequence_length)}
        padding = batch["segment_ids"] == 0
        np.testing.assert_array_equal(batch["loss_weights"], 1.0 - padding)
        assert not any(array[padding].any() for array in batch.values())
    if packing == "concatenate":
        # A document is cut at the ends of rows only: it begins once, and anew in each later row.
        segments = np.concatenate([batch["segment_ids"] for batch in batches])
        pieces = sum(len(set(row[row > 0])) for row in segments)
        lengths = np.cumsum([0, *map(len, expected_targets(texts, tokenizer))])
        cuts = {*lengths[1:-1], *range(sequence_length, len(expected), sequence_length)}
        assert pieces == len(cuts) + 1


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_segment_is_one_run_of_its_row(texts, data_of, packing):
    data = data_of(texts, packing=packing, too_long="truncate")
    batches = itertools.islice(training_batches(data, seed=0, **SHAPE), 50)
    for row in itertools.chain.from_iterable(batch["segment_ids"] for batch in batches):
        runs = [segment for segment, _ in itertools.groupby(row)]
        assert len(runs) == len(set(runs))


def epochs_of(data, seed, count):
    """The first `count` epochs, each as the targets of its documents, in order.

    One row at a time stays in its place.
    """
    texts = [record.text for record in data.train[0].records]
    size = sum(map(len, expected_targets(texts, data.tokenizer)))
    stream = []
    batches = training_batches(data, seed=seed, **SHAPE)
    while len(stream) < count * size:
        stream += targets_of([next(batches)])
    return [stream[i * size : (i + 1) * size] for i in range(count)]


def test_an_epoch_has_every_document_once_and_no_two_have_the_same_order(texts, data_of, tokenizer):
    epochs = epochs_of(data_of(texts, window_rows=1), seed=0, count=3)
    expected = collections.Counter(map(tuple, expected_targets(texts, tokenizer)))
    for epoch in epochs:
        ends = [i + 1 for i, target in enumerate(epoch) if target == tokenizer.eos_id]
        parts = [tuple(epoch[a:b]) for a, b in itertools.pairwise([0, *ends])]
        assert collections.Counter(parts) == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides_the_order(texts, data_of):
    data = data_of(texts, window_rows=1)
    first, again, other = (epochs_of(data, seed=seed, count=1) for seed in (5, 5, 60))
    assert first == again != other


def test_a_single_document_is_repeated(texts, data_of, tokenizer):
    text = max(texts, key=len)
    once, twice = epochs_of(data_of([text], window_rows=1), seed=0, count=2)
    assert once == twice == expected_targets([text], tokenizer)[0]


def test_rows_are_shuffled_by_the_window(texts, data_of):
    def rows(seed, window_rows):
        batches = training_batches(data_of(texts, window_rows=window_rows), seed=seed, **SHAPE)
        return [row.tobytes() for _ in range(8) for row in next(batches)["tokens"]]

    packed, shuffled, other = rows(0, 1), rows(0, 6), rows(1, 6)
    orders = set()
    for start in range(0, 24, 6):
        window = slice(start, start + 6)
        assert sorted(packed[window]) == sorted(shuffled[window])
        assert packed[window] != shuffled[window]
        orders.add(tuple(packed[window].index(row) for row in shuffled[window]))
    assert len(orders) == 4  # each window has one of its own
    assert shuffled != other


def test_each_part_is_in_an_order_of_its_own_in_each_shard(tokenizer):
    parts = [TrainingPart(name, records_of([f"{name} {i:02}" for i in range(40)])) for name in "ab"]
    data = Data(train=parts, held_out=[], tokenizer=tokenizer, num_shards=2, window_rows=1)
    batches = training_batches(data, batch_size=2, sequence_length=64, seed=0)
    rows = np.concatenate([next(batches)["targets"] for _ in range(8)], axis=1).tolist()
    orders = set()
    for shard, row in enumerate(rows):
        for name in "ab":
            numbers = [int(n) for n in re.findall(rf"{name} (\d\d)", tokenizer.decode(row))[:20]]
            assert sorted(numbers) == list(range(shard, 40, 2))
            orders.add(tuple(n // 2 for n in numbers))
    assert len(orders) == 4  # else neighbours in the source would meet in the same batch


# One token a row makes every row end a document or be cut from one; two rows of 700 tokens are a
# good part of an epoch; 64 rows are not a whole number of batches of 3.
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize(
    ("batch_size", "sequence_length", "window_rows", "num_shards"),
    [(1, 1, 1, 1), (3, 16, 1, 1), (3, 16, 64, 3), (2, 700, 1, 2), (6, 40, 5, 3)],
)
def test_resumption_is_exact_after_any_batch(
    texts, data_of, tokenizer, batch_size, sequence_length, window_rows, num_shards, packing
):
    data = data_of(
        texts, window_rows=window_rows, num_shards=num_shards, packing=packing, too_long="truncate"
    )

    def start():
        return training_batches(
            data, batch_size=batch_size, sequence_length=sequence_length, seed=7
        )

    iterator, batches, states = start(), [], []
    tokens_an_epoch = sum(map(len, expected_targets(texts, tokenizer)))
    if batch_size == 1:
        tokens_an_epoch //= 10  # the other cases go over the epochs' ends
    count = 5 + int(1.3 * tokens_an_epoch) // (batch_size * sequence_length)
    for _ in range(count + 4):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    chosen = random.Random(0).sample(range(count), k=min(count, 5))
    for i in {0, 1, *chosen}:
        resumed = start()
        resumed.set_state(json.loads(states[i]))
        assert json.dumps(resumed.get_state()) == states[i]
        for n in range(4):
            assert_same_batches([next(resumed)], [batches[i + n]])
            assert json.dumps(resumed.get_state()) == states[i + n + 1]


def test_resumption_is_exact_where_documents_fill_rows(data_of, tokenizer):
    # Then no document is left over when the state is taken.
    texts = [chr(ord("a") + i) * 7 for i in range(10)]
    length = len(tokenizer.encode("a" * 7)) + 1
    texts = [text for text in texts if len(tokenizer.encode(text)) == length - 1]
    assert len(texts) > 3
    data = data_of(texts, window_rows=1)
    start = functools.partial(training_batches, data, batch_size=2, sequence_length=length, seed=0)
    iterator = start()
    for _ in range(15):
        resumed = start()
        resumed.set_state(json.loads(json.dumps(iterator.get_state())))
        assert_same_batches([next(resumed)], [next(iterator)])


def test_a_used_iterator_can_go_back(texts, data_of):
    iterator = training_batches(data_of(texts), seed=1, **SHAPE)
    next(iterator)
    state = iterator.get_state()
    ahead = [next(iterator) for _ in range(40)]
    iterator.set_state(state)
    assert_same_batches([next(iterator) for _ in range(40)], ahead)


def documents_in(row):
    """The pieces of documents of a row, each as a tuple of its targets."""
    return [
        tuple(row["targets"][row["segment_ids"] == segment].tolist())
        for segment in range(1, row["segment_ids"].max() + 1)
    ]


class _Hosts:
    """Some processes that read the batches of one run together."""

    def __init__(self, data, hosts, **arguments):
        self.iterators = [
            training_batches(data, hosts=hosts, host=host, **arguments) for host in range(hosts)
        ]

    def next(self):
        parts = [next(iterator) for iterator in self.iterators]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def states(self):
        merged = {}
        for iterator in self.iterators:
            state = json.loads(json.dumps(iterator.get_state()))
            assert merged.keys().isdisjoint(state)
            merged.update(state)
        return merged

    def restore(self, states):
        for iterator in self.iterators:
            iterator.set_state(states)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_an_epoch_read_by_1_2_4_and_3_hosts_has_each_record_once(data_of, tokenizer, packing):
    texts = make_texts(240, seed=3)
    data = data_of(texts, num_shards=12, packing=packing, too_long="truncate", window_rows=4)
    arguments = dict(batch_size=24, sequence_length=96, seed=0)
    alone = training_batches(data, **arguments)
    seen = [[] for _ in range(12)]  # of each shard, the targets in order of the rows
    states, done = None, 0
    for hosts, steps in ((1, 1), (2, 2), (4, 1), (3, 10)):
        group = _Hosts(data, hosts, **arguments)
        if states is not None:
            group.restore(states)
        for _ in range(steps):
            batch = group.next()
            assert_same_batches([batch], [next(alone)])
            done += 1
            for row in range(24):
                values = {name: array[row] for name, array in batch.items()}
                seen[row // 2] += documents_in(values)
        states = group.states()
    # Documents that are cut between rows are put together from their pieces: the texts begin with
    # different numbers and every shard's first epoch is its first records' worth of targets.
    expected = collections.defaultdict(collections.Counter)
    for i, targets in enumerate(expected_targets(texts, tokenizer)):
        expected[i % 12].update(targets[:96] if packing == "best_fit" else targets)
    for shard in range(12):
        left, total = collections.Counter(), sum(expected[shard].values())
        for piece in seen[shard]:
            if sum(left.values()) < total:
                left.update(piece)
        assert left == expected[shard]


def test_host_counts_and_batches_that_the_shards_do_not_divide_are_refused(texts, data_of):
    data = data_of(texts, num_shards=12)
    arguments = dict(batch_size=24, sequence_length=16, seed=0)
    with pytest.raises(ValueError, match=r"num_shards=12 is not divisible by .* hosts, 5; choose"):
        training_batches(data, hosts=5, **arguments)
    with pytest.raises(ValueError, match=r"size=20 is not divisible by data\.num_shards, 12; choo"):
        training_batches(data, **{**arguments, "batch_size": 20})
    with pytest.raises(ValueError, match="host=3 must lie between 0 and 2"):
        training_batches(data, hosts=3, host=3, **arguments)
    with pytest.raises(ValueError, match=r"'texts' has 100 records to train on, but .*=200; lower"):
        training_batches(data_of(texts, num_shards=200), batch_size=200, sequence_length=16, seed=0)
    first, second = (training_batches(data, hosts=2, host=host, **arguments) for host in (0, 1))
    with pytest.raises(ValueError, match="lacks 10, 11, 6, 7, 8, 9; it takes the states of all"):
        second.set_state(first.get_state())


def test_a_mixture_gives_each_source_its_share_of_the_tokens(tokenizer):
    parts = [
        TrainingPart("short", records_of(make_texts(50, 1, longest=5)), weight=1.0),
        TrainingPart("long", records_of(make_texts(10, 2, longest=60)), weight=3.0),
    ]
    data = Data(train=parts, held_out=[], tokenizer=tokenizer, window_rows=4)
    batches = training_batches(data, batch_size=4, sequence_length=32, seed=0)
    for _ in range(100):
        next(batches)
    metrics = input_metrics(data, batches.get_state(), sequence_length=32)
    assert metrics["packing_efficiency"] == 1  # no gap between epochs
    assert metrics["short/tokens"] + metrics["long/tokens"] == 100 * 4 * 32
    # A document of at most 130 tokens too many, of 12,800.
    assert metrics["long/tokens"] / metrics["short/tokens"] == pytest.approx(3, rel=0.05)
    assert metrics["long/epoch"] == metrics["long/records"] / 10 > 5
    state = json.loads(json.dumps(batches.get_state()))
    resumed = training_batches(data, batch_size=4, sequence_length=32, seed=0)
    resumed.set_state(state)
    for _ in range(20):
        assert_same_batches([next(resumed)], [next(batches)])


@pytest.mark.usefixtures("untyped")
def test_threads_are_ended_once_however_often_an_iterator_is_closed(monkeypatch):
    iterator = iter(_ShardedBatches({"0": None}, rows_a_shard=1))
    ended = []
    monkeypatch.setattr(iterator._pool, "shutdown", lambda **_: ended.append(True))
    iterator.close()
    iterator.close()
    assert ended == [True]
