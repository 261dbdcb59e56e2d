"""What a run begins with: the parts of its data, what it holds out, and its tokenizer."""

import dataclasses
import gzip
import json
import subprocess

import corpora
import pytest
from corpora import make_texts

from qwen3next_jax.data import corpus as corpus_module
from qwen3next_jax.data.corpus import check_same_data, load_data
from qwen3next_jax.data.sources import Record, open_source
from qwen3next_jax.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def texts():
    return make_texts()


@pytest.fixture
def corpus(tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    return dict(source="text", path=str(tmp_path / "*.txt"), holdout_fraction=0.3)


def load_bytes(**given):
    """Data whose tokens are bytes; a quarter is held out."""
    return load_data(
        tokenizer="bytes", holdout_fraction=0.25, vocab_size=258, trained_tokenizer="", **given
    )


def test_the_parts_of_a_mixture_are_read_and_weighed_as_told(tmp_path):
    for name, field in (("a", "text"), ("b", "body")):
        lines = (json.dumps({field: f"{name} {i}", "other": "none"}) for i in range(20))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = {
        "few": {"weight": 1, "path": f"{tmp_path}/a.jsonl", "source": "jsonl"},
        "many": {"weight": 3, "path": f"{tmp_path}/b.jsonl", "source": "jsonl", "field": "body"},
    }
    data = load_bytes(source="mixture", mixture=mixture)
    assert {part.name: part.weight for part in data.train} == {"few": 1.0, "many": 3.0}
    for part, name in zip(data.train, "ab", strict=True):
        held_out = data.held_out_parts[part.name]
        assert {r.text for r in (*part.records, *held_out)} == {f"{name} {i}" for i in range(20)}
        assert len(part.records) + len(held_out) == part.fingerprint[0] == 20


def test_each_part_of_a_mixture_is_of_its_own_split(tmp_path, monkeypatch):
    texts, splits = corpora.write("jsonl", tmp_path / "a", make_texts()), []

    def opened(*, split, **_):
        splits.append(split)
        return open_source(**texts)

    monkeypatch.setattr(corpus_module, "open_source", opened)
    mixture = {name: {"weight": 1, **part} for name, part in (("a", {"split": "test"}), ("b", {}))}
    load_bytes(source="tfds", path="a dataset", split="train[:9]", mixture=mixture)
    assert splits == ["test", "train[:9]"]


def two_parts(folder):
    """A mixture of two sources of other texts."""
    return {
        name: {"weight": 1, **corpora.write("jsonl", folder / name, make_texts(seed=seed))}
        for seed, name in enumerate("ab")
    }


def test_files_that_are_skipped_add_up_over_the_parts_of_a_mixture(tmp_path):
    mixture = two_parts(tmp_path)
    for name, part in mixture.items():
        (tmp_path / name / "bad.jsonl.gz").write_bytes(b"truncated")
        part["path"] = f"{tmp_path / name}/*"
    data = load_bytes(source="mixture", mixture=mixture, on_error="skip")
    assert data.skipped_files == 2


def test_the_tokenizer_of_a_mixture_is_trained_on_all_of_its_parts(tmp_path):
    data = load_data(
        source="mixture",
        mixture=two_parts(tmp_path),
        holdout_fraction=0.25,
        vocab_size=300,
        trained_tokenizer=tmp_path / "model",
    )
    texts = [record.text for part in data.train for record in part.records]
    train_tokenizer(texts, tmp_path / "direct", vocab_size=300)
    assert (tmp_path / "model").read_bytes() == (tmp_path / "direct").read_bytes()


def test_the_token_that_ends_texts_is_looked_for_behind_records_that_cannot_be_used(tmp_path):
    (tmp_path / "a.jsonl").write_text("bad\n" * 10 + '{"text": "good"}\n' * 10)
    data = load_bytes(source="jsonl", path=f"{tmp_path}/a.jsonl", on_error="skip")
    assert data.ends() == [data.tokenizer.eos_id]


def test_records_that_moved_to_another_file_are_other_data(tmp_path):
    def load(**lengths):
        for path in tmp_path.glob("*.jsonl"):
            path.unlink()
        for name, n in lengths.items():
            lines = [json.dumps({"text": f"{name} {i}"}) for i in range(n)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return load_bytes(source="jsonl", path=f"{tmp_path}/*.jsonl")

    began_with = json.loads(json.dumps(load(a=12, b=8).fingerprint()))
    check_same_data(load(a=12, b=8), began_with)
    for lengths in (dict(a=8, b=12), dict(a=12, c=8)):
        with pytest.raises(ValueError, match="20 records then, 20 now, in other files"):
            check_same_data(load(**lengths), began_with)


def test_parts_in_another_order_are_refused(tmp_path):
    parts = two_parts(tmp_path)

    def load(names):
        return load_bytes(source="mixture", mixture={name: parts[name] for name in names})

    began_with = json.loads(json.dumps(load("ba").fingerprint()))
    check_same_data(load("ba"), began_with)
    with pytest.raises(ValueError, match="the parts: b, a then, a, b now, in this order"):
        check_same_data(load("ab"), began_with)


def test_the_first_run_trains_a_tokenizer_and_the_next_reuses_it(corpus, tmp_path):
    path = tmp_path / "run" / "tokenizer.model"
    first = load_data(**corpus, vocab_size=300, trained_tokenizer=path)
    written = path.stat().st_mtime_ns
    second = load_data(**corpus, vocab_size=320, trained_tokenizer=path)
    assert first.tokenizer.vocab_size == second.tokenizer.vocab_size == 300
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"has 300 tokens but model\.vocab_size=299"):
        load_data(**corpus, vocab_size=299, trained_tokenizer=path)


def test_a_chat_template_goes_with_a_tokenizer_that_is_trained(corpus, tmp_path):
    (tmp_path / "template").write_text("{{ messages }}")
    corpus["chat_template"] = str(tmp_path / "template")
    for _ in range(2):  # trained, then found
        data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "tokenizer")
        assert data.tokenizer.chat_template == "{{ messages }}"


def test_the_tokenizer_never_sees_the_held_out_part(corpus, tmp_path):
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "a")
    train_tokenizer(
        [record.text for record in data.train[0].records], tmp_path / "b", vocab_size=300
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_given_tokenizer_is_used(corpus, tmp_path, texts):
    train_tokenizer(texts, tmp_path / "given", vocab_size=290)
    corpus["tokenizer"] = str(tmp_path / "given")
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "unused")
    assert data.tokenizer.vocab_size == 290
    assert not (tmp_path / "unused").exists()
    corpus["tokenizer"] = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "unused")


def test_held_out_records_of_which_none_can_be_used_are_refused(corpus, tmp_path):
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "tokenizer")
    empty = dataclasses.replace(
        data, held_out=[Record(name=f"{i}.txt", text="") for i in range(2)], on_error="skip"
    )
    with pytest.raises(ValueError, match="None of the 2 held-out records has text to predict"):
        assert empty.held_out_bytes


def test_the_number_of_held_out_records_that_cannot_be_used_is_logged(corpus, tmp_path, caplog):
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "tokenizer")
    texts = ["", "good", "", ""]
    records = [Record(name=f"{i}.txt", text=text) for i, text in enumerate(texts)]
    with caplog.at_level("WARNING", logger="absl"):
        some = dataclasses.replace(data, held_out=records, on_error="skip")
        assert some.held_out_bytes == len("good")
    assert "Skipped 3 of 4 records to evaluate on" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="absl"):
        whole = dataclasses.replace(data, held_out=records[1:2], on_error="skip")
        assert whole.held_out_bytes == len("good")
    assert "records to evaluate on" not in caplog.text


def test_bytes_and_gzip_are_of_the_held_out_texts(corpus, tmp_path):
    data = load_data(**corpus, vocab_size=300, trained_tokenizer=tmp_path / "tokenizer")
    held_out = b"".join((tmp_path / record.name).read_bytes() for record in data.held_out)
    assert data.held_out_bytes == len(held_out) > 0
    command = subprocess.run(["gzip", "-9"], input=held_out, capture_output=True, check=True)
    assert gzip.decompress(command.stdout) == held_out
    # Both write the same format; a byte or two of slack for another implementation's choices.
    bits = data.gzip_bits_per_byte * len(held_out)
    assert bits == pytest.approx(8 * len(command.stdout), abs=16)
