"""What is skipped is counted, rows are full, and no kill changes what is read afterwards."""

import dataclasses
import itertools
import json
import pathlib
import random
import subprocess
import sys
import time

import corpora
import numpy as np
import pytest
import read_batches
from corpora import make_texts

from qwen3next_jax.data import documents
from qwen3next_jax.data.corpus import load_data
from qwen3next_jax.data.packing import best_fit, concatenate
from qwen3next_jax.data.pipeline import evaluation_batches, input_metrics, training_batches
from qwen3next_jax.data.sources import BadRecordError, open_source
from qwen3next_jax.data.train_tokenizer import train_tokenizer

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "model"
    train_tokenizer(make_texts(), path, vocab_size=300)
    return str(path)


def lines_of(log):
    """The whole lines, by run; a kill may leave a part of one."""
    found = {}
    for line in log.read_text().split("\n")[:-1]:
        name, digest, state = json.loads(line)
        found.setdefault(name, []).append((digest, state))
    return found


def read_until_killed(runs, folder, name, lines):
    (folder / f"{name}.json").write_text(json.dumps(runs))
    log = folder / f"{name}.log"
    log.touch()
    command = [sys.executable, HERE / "read_batches.py", folder / f"{name}.json", log]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None and log.read_text().count("\n") < lines:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read().decode()
    process.kill()
    process.wait()
    process.stderr.close()
    return lines_of(log)


@pytest.mark.slow
def test_a_killed_reader_goes_on_bit_for_bit_from_every_source_in_both_packings(
    tmp_path, tokenizer_file
):
    texts = make_texts(60)
    given = {kind: corpora.write(kind, tmp_path / kind, texts) for kind in corpora.WRITTEN}
    given |= {"stdlib": {"source": "stdlib"}, "synthetic": {"source": "synthetic"}}
    prepare = [sys.executable, "-m", "qwen3next_jax.data.prepare", "--source=text",
               f"--path={given['text']['path']}", f"--tokenizer={tokenizer_file}",
               f"--output={tmp_path / 'prepared'}", "--workers=1"]  # fmt: skip
    subprocess.run(prepare, check=True, cwd=HERE.parent, capture_output=True)
    given["prepared"] = {"source": "prepared", "path": str(tmp_path / "prepared")}
    parts = {"a": {**given["jsonl"], "weight": 2.0}, "b": {**given["text"], "weight": 1.0}}
    given["mixture"] = {"source": "mixture", "mixture": parts}
    read = dict(batch_size=4, sequence_length=64, seed=3)
    runs = {}
    for kind, source in given.items():
        for packing in ("concatenate", "best_fit"):
            load = dict(
                source,
                tokenizer=tokenizer_file,
                holdout_fraction=0.2,
                vocab_size=300,
                trained_tokenizer="",
                packing=packing,
                too_long="truncate",
                num_shards=2,
                window_rows=8,
            )
            runs[f"{kind}, {packing}"] = {"load": load, "read": read, "state": None}
    rng = random.Random()  # another moment each time
    before = read_until_killed(runs, tmp_path, "first", rng.randrange(40, 400))
    resumed = {
        name: {**run, "state": before[name][-1][1] if name in before else None}
        for name, run in runs.items()
    }
    after = read_until_killed(resumed, tmp_path, "second", 330)
    for name, run in runs.items():
        whole = read_batches.open_run(run)
        course = before.get(name, []) + after[name]
        assert len(after[name]) >= 15
        for digest, _ in course:
            assert read_batches.digest(next(whole)) == digest, name
        whole.close()


def write_lines(path, texts, bad):
    lines = corpora.json_lines(texts).splitlines()
    for place, line in bad:
        lines.insert(place, line)
    path.write_text("\n".join(lines))


def load_lines(path, tokenizer_file, **options):
    """The data of JSONL files, by `load_data`."""
    given = dict(tokenizer=tokenizer_file, vocab_size=300, trained_tokenizer="")
    return load_data(source="jsonl", path=str(path), **given, **options)


def test_a_document_as_long_as_a_row_is_not_too_long(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["x" * 31] * 16, [])
    given = dict(packing="best_fit", holdout_fraction=0.5, num_shards=1, window_rows=2)
    data = load_lines(tmp_path / "a.jsonl", "bytes", **given)
    length = len(data.tokenizer.encode("x" * 31)) + 1  # with the token that ends it
    batches = training_batches(data, batch_size=2, sequence_length=length, seed=0)
    assert (next(batches)["segment_ids"] == 1).all()
    counted = input_metrics(data, batches.get_state(), sequence_length=length)
    assert counted["truncated_records"] == 0
    with pytest.raises(BadRecordError, match=f"has {length} tokens, more than a row of"):
        next(training_batches(data, batch_size=2, sequence_length=length - 1, seed=0))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_what_is_skipped_or_truncated_is_counted_and_nothing_else_is_missing(
    packing, tmp_path, tokenizer_file, monkeypatch
):
    logged = []
    monkeypatch.setattr(
        documents.logging, "log_first_n", lambda level, text, n, error: logged.append(str(error))
    )
    texts = make_texts(60)
    bad = [(3, "no JSON"), (17, '{"text": ""}'), (40, '{"other": 1}')]
    write_lines(tmp_path / "a.jsonl", texts, bad)
    (tmp_path / "b.jsonl.gz").write_bytes(b"truncated")
    given = (tmp_path / "*.jsonl*", tokenizer_file)
    options = dict(holdout_fraction=0.1, packing=packing, window_rows=4, num_shards=2)
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: is truncated or no gzip"):
        load_lines(*given, **options)
    data = load_lines(*given, **options, on_error="skip", too_long="truncate")
    assert data.skipped_files == 1
    records = data.train[0].records
    usable = [i for i in range(len(records)) if _usable(records, i)]
    skipped = len(records) - len(usable)
    assert skipped > 0
    lengths = [len(data.tokenizer.encode(records[i].text)) + 1 for i in usable]
    batches = training_batches(data, batch_size=2, sequence_length=64, seed=0)
    epochs = 0
    while epochs < 2:
        next(batches)
        states = batches.get_state()
        epochs = min(s["read"][0] // len(range(int(k), len(records), 2)) for k, s in states.items())
    metrics = input_metrics(data, states, sequence_length=64)
    # A shard that has begun its third epoch has met at least all of its bad records twice; the
    # other may be further.
    assert 2 * skipped <= metrics["skipped_records"] <= 6 * skipped
    assert metrics["skipped_files"] == 1
    records_read = sum(sum(state["read"]) for state in states.values())
    window = 4 * 64 * 2  # as many documents at most are read ahead of what was yielded, or less
    assert 0 <= metrics["jsonl/epoch"] * len(records) - records_read <= window
    too_long = sum(length > 64 for length in lengths)
    assert too_long
    if packing == "best_fit":
        assert metrics["truncated_records"] >= 2 * too_long
        strict = load_lines(*given, **options, on_error="skip")
        strict_batches = training_batches(strict, batch_size=2, sequence_length=64, seed=0)
        for _ in range(20):
            next(strict_batches)
        counted = input_metrics(strict, strict_batches.get_state(), sequence_length=64)
        assert counted["skipped_records"] > 0 == counted["truncated_records"]
    else:
        assert metrics["truncated_records"] == 0
    assert any(message.startswith("a.jsonl:18: is an empty document") for message in logged)
    list(evaluation_batches(data, batch_size=2, sequence_length=64))


def _usable(records, i):
    try:
        return bool(records[i].text)
    except BadRecordError:
        return False


def test_a_bad_record_stops_a_run_that_does_not_skip(tmp_path, tokenizer_file):
    write_lines(tmp_path / "a.jsonl", make_texts(30), [(3, '{"text": ""}')])
    data = load_lines(tmp_path / "*.jsonl", tokenizer_file, holdout_fraction=0.1)
    batches = training_batches(data, batch_size=1, sequence_length=64, seed=0)
    with pytest.raises(BadRecordError, match=r"a\.jsonl:4: is an empty document"):
        list(itertools.islice(batches, 50))


def test_a_document_longer_than_a_row_is_named_where_documents_stay_whole(tmp_path, tokenizer_file):
    write_lines(tmp_path / "a.jsonl", ["word " * 100] * 20, [])
    data = load_lines(
        tmp_path / "a.jsonl", tokenizer_file, holdout_fraction=0.2, packing="best_fit"
    )
    batches = training_batches(data, batch_size=1, sequence_length=64, seed=0)
    with pytest.raises(BadRecordError, match=r"a\.jsonl:\d+: has \d+ tokens, more than a row of"):
        next(batches)


def test_a_truncated_document_keeps_as_many_of_its_tokens_as_a_row_has(tmp_path, tokenizer_file):
    text = " ".join(f"word {i}" for i in range(60))
    write_lines(tmp_path / "a.jsonl", [text] * 20, [])
    data = load_lines(
        tmp_path / "a.jsonl",
        tokenizer_file,
        holdout_fraction=0.2,
        packing="best_fit",
        too_long="truncate",
    )
    batch = next(training_batches(data, batch_size=1, sequence_length=64, seed=0))
    ids = data.tokenizer.encode(text)
    assert len(ids) > 64
    np.testing.assert_array_equal(batch["tokens"], [[data.tokenizer.bos_id, *ids[:63]]])
    np.testing.assert_array_equal(batch["targets"], [ids[:64]])
    assert (batch["loss_weights"] == 1).all()


def test_a_shard_without_a_usable_record_ends_the_run(tmp_path, tokenizer_file):
    write_lines(tmp_path / "a.jsonl", [], [(0, "bad")] * 20)
    data = load_lines(tmp_path / "a.jsonl", tokenizer_file, holdout_fraction=0.2, on_error="skip")
    batches = training_batches(data, batch_size=1, sequence_length=64, seed=0)
    with pytest.raises(ValueError, match="None of a shard's records of 'jsonl' can be used"):
        next(batches)


@pytest.mark.parametrize("seed", range(8))
def test_one_usable_record_of_a_shard_is_enough(seed, tmp_path, tokenizer_file):
    write_lines(tmp_path / "a.jsonl", ["good"], [(i, "bad") for i in range(4)])
    data = load_lines(tmp_path / "a.jsonl", tokenizer_file, holdout_fraction=0.5, on_error="skip")
    every = dataclasses.replace(data.train[0], records=open_source("jsonl", f"{tmp_path}/a.jsonl"))
    data = dataclasses.replace(data, train=[every])
    batches = training_batches(data, batch_size=1, sequence_length=64, seed=seed)
    assert all(next(batches)["segment_ids"].any() for _ in range(20))  # 20 epochs


def test_an_epoch_may_end_with_bad_records_that_would_be_a_window_of_their_own(
    tmp_path, tokenizer_file
):
    write_lines(tmp_path / "a.jsonl", ["word " * 100] * 3, [(i, "bad") for i in range(9)])
    data = load_lines(
        tmp_path / "a.jsonl",
        tokenizer_file,
        holdout_fraction=0.3,
        on_error="skip",
        packing="best_fit",
        too_long="truncate",
        window_rows=1,  # each good record is a window
    )
    batches = training_batches(data, batch_size=1, sequence_length=64, seed=0)
    assert all(next(batches)["segment_ids"].all() for _ in range(20))  # several epochs


def test_skipped_records_are_counted_once_by_a_run_that_resumes_inside_their_window(
    tmp_path, tokenizer_file
):
    write_lines(tmp_path / "a.jsonl", make_texts(30), [(3, "bad"), (17, "bad")])
    options = dict(holdout_fraction=0.1, on_error="skip", window_rows=4)
    data = load_lines(tmp_path / "a.jsonl", tokenizer_file, **options)
    first, resumed = (
        training_batches(data, batch_size=1, sequence_length=64, seed=0) for _ in range(2)
    )
    for _ in range(30):  # of which most are inside a window
        next(first)
        resumed.set_state(first.get_state())
        next(resumed)
        next(first)
        assert resumed.get_state() == first.get_state()
    assert first.get_state()["0"]["counts"]["skipped"][0] > 2  # else nothing was there to count


def realistic_lengths(count, longest, seed=0):
    """Log-normal, median 400 tokens and mean 900, as web pages and chats have them."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(mean=np.log(400), sigma=1.27, size=count)
    return np.clip(lengths, 8, longest).astype(int).tolist()


@pytest.mark.parametrize("sequence_length", [2048, 4096, 8192])
def test_best_fit_fills_97_percent_of_a_window_s_rows_and_concatenation_all(sequence_length):
    lengths = iter(realistic_lengths(20_000, sequence_length))
    filled = rows = 0
    for _ in range(10):
        window = []
        while sum(window) < 128 * sequence_length:
            window.append(next(lengths))
        plan = best_fit(window, sequence_length)
        assert len(plan) <= 11 / 9 * -(-sum(window) // sequence_length) + 1
        filled, rows = filled + sum(window), rows + len(plan)
        assert len(concatenate(window, sequence_length)) == -(-sum(window) // sequence_length)
    assert filled / (rows * sequence_length) >= 0.97
