"""What a start that saved nothing leaves to the next one."""

import json

import pytest
from small_run import small_config, write_corpus

from qwen3next_jax.training.workdir import discard_unstarted_run


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus" / "texts")


def test_a_tokenizer_is_made_anew_for_other_texts_while_nothing_is_saved(corpus, tmp_path):
    config = small_config(corpus)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    kept = tmp_path / "tokenizer.model"
    kept.write_text("made of these texts")
    for same in (dict(train__global_batch_size=4), dict(data__window_rows=7)):
        discard_unstarted_run(small_config(corpus, **same), tmp_path)
        assert kept.exists()
    given = small_config(corpus, data__holdout_fraction=0.3, data__tokenizer=str(kept))
    discard_unstarted_run(given, tmp_path)  # somebody's own
    assert kept.exists()
    other = small_config(corpus, data__holdout_fraction=0.3)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    discard_unstarted_run(other, tmp_path)
    assert kept.exists()
    (tmp_path / "checkpoints" / "1").rmdir()
    discard_unstarted_run(other, tmp_path)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("jsonl", dict(data__field="body")),
        ("text", dict(data__on_error="skip")),
        ("text", dict(model__vocab_size=300)),
    ],
)
def test_a_tokenizer_is_made_anew_where_a_key_reads_other_texts_or_makes_it_another(
    source, other, corpus, tmp_path
):
    config = small_config(corpus, data__source=source)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    kept = tmp_path / "tokenizer.model"
    kept.write_text("made of these texts")
    discard_unstarted_run(small_config(corpus, data__source=source, **other), tmp_path)
    assert not kept.exists()


def test_a_start_that_failed_leaves_no_tokenizer_to_another_one(corpus, tmp_path):
    workdir, copied = tmp_path / "run", tmp_path / "run" / "tokenizer.json"
    workdir.mkdir()
    copied.write_text("somebody's own")
    # And then it failed, before it wrote anything.
    discard_unstarted_run(small_config(corpus), workdir)
    assert copied.exists()
    discard_unstarted_run(small_config(corpus, data__holdout_fraction=0.3), workdir)
    assert not copied.exists()
    # The same file may hold another tokenizer, or another chat template, by now.
    given = small_config(corpus, data__tokenizer=str(tmp_path / "tokenizer.json"))
    discard_unstarted_run(given, workdir)
    copied.write_text("a copy")
    discard_unstarted_run(given, workdir)
    assert not copied.exists()
