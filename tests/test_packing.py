"""Packed rows against packing in plain Python."""

import itertools
import random

import grain
import numpy as np
import pytest

from qwen3next_jax.data.packing import next_token_pairs, pack

BOS, EOS = 1, 2


def random_documents(count, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 99) for _ in range(rng.randrange(longest))] for _ in range(count)]


def rows_of(documents, sequence_length):
    pairs = [next_token_pairs(ids, bos=BOS, eos=EOS) for ids in documents]
    source = grain.MapDataset.source(pairs).to_iter_dataset()
    return list(pack(source, sequence_length))


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
    np.testing.assert_array_equal([[row[f] for f in fields] for row in rows],
                                  expected.transpose(0, 2, 1))  # fmt: skip
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
