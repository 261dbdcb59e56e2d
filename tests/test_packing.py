"""Packed rows against packing in plain Python."""

import itertools
import random

import numpy as np
import pytest

from qwen3next_jax.data.documents import next_token_pairs
from qwen3next_jax.data.packing import best_fit, concatenate, fill_row

BOS, EOS = 1, 2


def random_documents(count, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 99) for _ in range(rng.randrange(longest))] for _ in range(count)]


def rows_of(documents, sequence_length, pack=concatenate):
    pairs = [next_token_pairs(ids, bos=BOS, eos=EOS) for ids in documents]
    plan = pack([len(pair["tokens"]) for pair in pairs], sequence_length)
    return [fill_row(pieces, pairs, sequence_length) for pieces in plan]


def expected_rows(documents, sequence_length):
    """Token by token: (token, target, weight, segment, position)."""
    stream = []
    for number, ids in enumerate(documents):
        delimited = [BOS, *ids, EOS]
        stream += [(number, a, b) for a, b in itertools.pairwise(delimited)]
    rows = []
    for start in range(0, len(stream), sequence_length):
        row, previous, segment, position = [], None, 0, 0
        for number, token, target in stream[start : start + sequence_length]:
            if number != previous:
                previous, segment, position = number, segment + 1, 0
            row.append((token, target, 1, segment, position))
            position += 1
        rows.append(row + [(0, 0, 0, 0, 0)] * (sequence_length - len(row)))
    return rows


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 16, 64, 1000])
@pytest.mark.parametrize("longest", [1, 5, 40])  # 1: empty documents, one target each
def test_rows_equal_plain_python(sequence_length, longest):
    documents = random_documents(50, longest, seed=sequence_length)
    rows = rows_of(documents, sequence_length)
    fields = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    expected = np.array(expected_rows(documents, sequence_length))
    np.testing.assert_array_equal(
        [[row[f] for f in fields] for row in rows], expected.transpose(0, 2, 1)
    )
    for row in rows:
        assert set(row) == set(fields)
        assert {row[f].dtype for f in fields if f != "loss_weights"} == {np.dtype(np.int32)}
        assert row["loss_weights"].dtype == np.float32


def test_every_token_after_bos_is_predicted_once_from_the_one_before():
    documents = random_documents(40, 30)
    predicted = []
    for row in rows_of(documents, 16):
        real = row["segment_ids"] > 0
        predicted += zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True)
    delimited = [[BOS, *ids, EOS] for ids in documents]
    assert predicted == [pair for d in delimited for pair in itertools.pairwise(d)]


def test_documents_that_fill_rows_exactly_need_no_padding():
    rows = rows_of([[5] * 7, [6] * 7, [7] * 15], 8)
    assert len(rows) == 4
    assert all(row["loss_weights"].all() for row in rows)
    assert [row["segment_ids"].max() for row in rows] == [1, 1, 1, 1]


def plain_best_fit(lengths, size):
    """Row of each document, by looking at all rows each time."""
    rows, chosen = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [
            (size - sum(row), r) for r, row in enumerate(rows) if sum(row) + lengths[i] <= size
        ]
        if not fitting:
            rows.append([])
            fitting = [(size, len(rows) - 1)]
        chosen[i] = min(fitting)[1]
        rows[chosen[i]].append(lengths[i])
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_puts_each_document_into_the_fullest_row_with_room(seed):
    rng = random.Random(seed)
    lengths = [rng.randrange(1, 65) for _ in range(200)]
    plan = best_fit(lengths, 64)
    assert {p.document: r for r, row in enumerate(plan) for p in row} == plain_best_fit(lengths, 64)


@pytest.mark.parametrize("sequence_length", [40, 64, 1000])
def test_best_fit_keeps_documents_whole_and_loses_none(sequence_length):
    documents = random_documents(80, 39)
    found = []
    for row in rows_of(documents, sequence_length, best_fit):
        assert row["segment_ids"][0] == 1
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            assert row["positions"][here].tolist() == list(range(here.sum()))
            found.append([*row["tokens"][here].tolist(), int(row["targets"][here][-1])])
        padding = row["segment_ids"] == 0
        assert not any(row[name][padding].any() for name in row)
        assert row["loss_weights"][~padding].all()
    assert sorted(found) == sorted([BOS, *ids, EOS] for ids in documents)


def test_best_fit_refuses_a_document_longer_than_a_row():
    assert len(best_fit([64, 64], 64)) == 2
    with pytest.raises(ValueError, match="of 65 tokens is longer than sequence_length=64"):
        best_fit([3, 65], 64)


def test_weights_of_documents_are_kept():
    pair = next_token_pairs([5, 6, 7], bos=BOS, eos=EOS)
    pair["loss_weights"] = np.array([0, 0.5, 1, 0], np.float32)
    row = fill_row(best_fit([4, 4], 10)[0], [pair, pair], 10)
    assert row["loss_weights"].tolist() == [0, 0.5, 1, 0, 0, 0.5, 1, 0, 0, 0]


def test_a_plan_can_begin_inside_the_first_document():
    whole = concatenate([10, 3, 9], 4)
    assert concatenate([10, 3, 9], 4, offset=8) == whole[2:]
