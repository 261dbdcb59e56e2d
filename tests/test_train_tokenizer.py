"""The command trains the tokenizer that a run would train for itself."""

import json

import pytest
from small_run import write_corpus

from qwen3next_jax.data.corpus import load_data
from qwen3next_jax.data.train_tokenizer import main, train_tokenizer


def test_it_is_the_runs_own(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "texts")
    given = ["--source=text", f"--path={corpus}/*.txt", "--vocab_size=320"]
    main([*given, "--holdout_fraction=0.2", f"--output={tmp_path}/a.model"])
    load_data(
        source="text",
        path=f"{corpus}/*.txt",
        holdout_fraction=0.2,
        vocab_size=320,
        trained_tokenizer=tmp_path / "b.model",
    )
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert "a.model: 320 tokens, from 3" in capsys.readouterr().out
    main([*given, f"--output={tmp_path}/all.model"])
    assert "all.model: 320 tokens, from 40 records" in capsys.readouterr().out


def test_texts_are_of_the_field_asked_for_without_the_bad_ones(tmp_path):
    texts = [f"the {i}th line holds {i * i} words, or {i**3}" for i in range(99)]
    lines = [json.dumps({"text": "none of it", "code": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "no JSON"]))
    given = ["--source=jsonl", f"--path={tmp_path}/a.jsonl", "--field=code", "--on_error=skip"]
    main([*given, "--vocab_size=300", f"--output={tmp_path}/a.model"])
    train_tokenizer(texts, tmp_path / "b.model", vocab_size=300)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_what_cannot_be_trained_on_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    given = ["--source=text", f"--output={tmp_path}/x"]
    with pytest.raises(SystemExit, match=r"too little text for a tokenizer of vocab_size=9999"):
        main([*given, f"--path={tmp_path}/*.txt", "--vocab_size=9999"])
    with pytest.raises(SystemExit, match=r"matches no file"):
        main([*given, f"--path={tmp_path}/*.md", "--vocab_size=300"])
    assert not (tmp_path / "x").exists()


def test_an_output_that_cannot_be_written_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    given = ["--source=text", "--path=/nowhere/*.txt", "--vocab_size=300"]
    with pytest.raises(SystemExit, match=r"is a directory; name a file inside it"):
        main([*given, f"--output={tmp_path}"])
    with pytest.raises(SystemExit, match=r"names a directory; name a file inside it"):
        main([*given, f"--output={tmp_path}/new/"])
    with pytest.raises(SystemExit, match=r"/file"):
        main([*given, f"--output={tmp_path}/file/x"])
