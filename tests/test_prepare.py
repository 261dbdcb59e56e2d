"""Prepared data are the source's, bit for bit, whoever makes them and whatever kills it."""

import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import corpora
import msgpack
import numpy as np
import pytest
from hf_tokenizer import CHATML, make_tokenizer_json

from qwen3next_jax.data import prepare as prepare_module
from qwen3next_jax.data.chat_document import chat_document
from qwen3next_jax.data.corpus import load_data
from qwen3next_jax.data.files import BadFileError
from qwen3next_jax.data.pipeline import evaluation_batches, training_batches
from qwen3next_jax.data.prepare import Job, main, make_shard, prepare
from qwen3next_jax.data.prepared import MANIFEST, encode_document, encode_error
from qwen3next_jax.data.sources import BadRecordError, open_source
from qwen3next_jax.data.tokenizer import keep_tokenizer, load_tokenizer

ROOT = pathlib.Path(__file__).parents[1]


def here(job, shards, done):
    """Makes shards one after another, in this process, the last first."""
    for k in reversed(shards):
        done(make_shard(job, k))


def line(i):
    return {"text": f"Text {i}. " + " ".join(f"word{i * j % 17}" for j in range(1 + i % 40))}


def chat(i):
    turns = [
        {"role": role, "content": f"{role} {i} says {j * i}"}
        for j in range(1 + i % 3)
        for role in ("user", "assistant")
    ]
    return {"messages": turns, "tools": [{"name": f"f{i}"}] if i % 2 else None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("sources")
    for i in range(40):
        (folder / f"{i}.txt").write_text(line(i)["text"])
    lines = [json.dumps(line(i)) for i in range(150)]
    lines[7], lines[70], lines[71] = "no JSON", '{"text": ""}', '{"other": 1}'
    for name, part in (("a", lines[:100]), ("b", lines[100:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    (folder / "chats.json").write_text("\n".join(json.dumps(chat(i)) for i in range(60)))
    make_tokenizer_json(folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    return folder


def described(kind, folder):
    """A source in a config's words."""
    return {
        "text": dict(source="text", path=f"{folder}/*.txt"),
        "jsonl": dict(source="jsonl", path=f"{folder}/*.jsonl", on_error="skip"),
        "chats": dict(source="jsonl", path=f"{folder}/chats.json", field="messages"),
    }[kind]


def job_of(kind, folder, output, **more):
    given = {"tokenizer": f"{folder}/tokenizer", "num_shards": 7, **more}
    return Job(**described(kind, folder), output=str(output), **given)


def data_of(tmp_path, packing="concatenate", **given):
    given = {
        "path": "", "field": "text", "split": "train", "mixture": {}, "holdout_fraction": 0.1,
        "num_shards": 2, "window_rows": 8, "packing": packing, "too_long": "truncate", **given,
    }  # fmt: skip
    return load_data(**given, vocab_size=300, trained_tokenizer=tmp_path / "none")


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "chats"])
def test_batches_of_prepared_data_are_those_of_the_source(kind, packing, folder, tmp_path):
    prepare(job_of(kind, folder, tmp_path / "prepared"), here)
    given = described(kind, folder)
    raw = data_of(tmp_path, packing, tokenizer=f"{folder}/tokenizer", **given)
    # Its own tokenizer is in the directory.
    ready = data_of(
        tmp_path,
        packing,
        source="prepared",
        path=str(tmp_path / "prepared"),
        tokenizer="",
        on_error=given.get("on_error", "raise"),
    )
    sizes = dict(batch_size=4, sequence_length=64)
    ours, theirs = (training_batches(data, seed=3, **sizes) for data in (ready, raw))
    weights = 0
    for _ in range(60):  # over an epoch
        a, b = next(ours), next(theirs)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        weights += a["loss_weights"].mean() / 60
    assert 0.1 < weights < (0.8 if kind == "chats" else 1.01)
    evaluations = [list(evaluation_batches(data, **sizes)) for data in (ready, raw)]
    assert len(evaluations[0]) == len(evaluations[1]) > 0
    for a, b in zip(*evaluations, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    counts = [
        {k: sum(s["counts"]["skipped"]) for k, s in batches.get_state().items()}
        for batches in (ours, theirs)
    ]
    assert counts[0] == counts[1]
    assert (sum(counts[0].values()) > 0) == (kind == "jsonl")


def test_the_manifest_counts_and_its_hashes_are_those_of_the_files(folder, tmp_path):
    manifest = prepare(job_of("jsonl", folder, tmp_path), here)
    assert manifest == json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["records"], manifest["skipped"]) == (150, 3)
    tokenizer = load_tokenizer(folder / "tokenizer")
    good = [line(i)["text"] for i in range(150) if i not in (7, 70, 71)]
    assert manifest["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in good)
    assert manifest["files"] == [["a.jsonl", 100, False], ["b.jsonl", 50, False]]
    file = folder / "tokenizer" / "tokenizer.json"
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    for shard in manifest["shards"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert len(content) == shard["bytes"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert len({shard["source_sha256"] for shard in manifest["shards"]}) == 7
    assert any("a.jsonl:8: is no JSON" in e for s in manifest["shards"] for e in s["examples"])
    assert {path.name for path in tmp_path.iterdir()} == {
        MANIFEST,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        *(shard["file"] for shard in manifest["shards"]),
    }


def contents(directory):
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def command(*arguments):
    return [sys.executable, "-m", "qwen3next_jax.data.prepare", *arguments]


def children(pid):
    """Processes begun by this one, by Linux's own account."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_killed_halfway_and_started_again_it_ends_with_the_same_bytes(folder, tmp_path):
    with (tmp_path / "texts.jsonl").open("w") as file:
        for i in range(1000):
            file.write(json.dumps({"text": json.dumps([line(i * j) for j in range(12)])}) + "\n")
    given = [
        "--source=jsonl",
        f"--path={tmp_path}/texts.jsonl",
        "--num_shards=16",
        f"--tokenizer={folder}/tokenizer",
        "--workers=2",
    ]
    main([*given, f"--output={tmp_path}/whole"])
    output = tmp_path / "killed"
    process = subprocess.Popen(command(*given, f"--output={output}"), cwd=ROOT)
    while len(list(output.glob("shard-*.json"))) < 8 and process.poll() is None:
        time.sleep(0.001)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(output.glob("shard-*.array_record"))
    assert 7 < len(done) < 16, "it was not killed halfway"
    finished = [path for path in done if path.with_name(f"{path.name}.json").exists()]
    assert len(finished) >= 8
    lost, *kept = finished
    os.truncate(lost, lost.stat().st_size // 2)  # as a power cut may leave it
    before = [path.stat().st_mtime_ns for path in kept]
    assert not (output / MANIFEST).exists()
    with pytest.raises(BadFileError, match=r"holds no manifest\.json; .* Started again, it goes o"):
        open_source("prepared", str(output))
    if sys.platform == "linux":
        assert workers
        for _ in range(3000):  # none of them stays behind
            if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
                break
            time.sleep(0.01)
        else:
            pytest.fail(f"workers {workers} outlive their parent")
    main([*given, f"--output={output}"])
    assert contents(output) == contents(tmp_path / "whole")
    # What was finished and whole was not made again.
    assert [path.stat().st_mtime_ns for path in kept] == before
    main([*given, f"--output={output}"])  # nothing is left to do
    assert contents(output) == contents(tmp_path / "whole")


def test_an_apache_beam_pipeline_makes_the_same_shards(folder, tmp_path):
    pytest.importorskip("apache_beam", reason="pip install 'qwen3next_jax[beam]' for this test")
    given = [
        "--source=jsonl",
        f"--path={folder}/*.jsonl",
        "--on_error=skip",
        "--num_shards=5",
        f"--tokenizer={folder}/tokenizer",
    ]
    main([*given, f"--output={tmp_path}/beam", "--beam", "--", "--runner=DirectRunner"])
    prepare(job_of("jsonl", folder, tmp_path / "plain", num_shards=5), here)
    assert contents(tmp_path / "beam") == contents(tmp_path / "plain")


@pytest.fixture
def ready(folder, tmp_path):
    prepare(job_of("chats", folder, tmp_path / "ready"), here)
    return tmp_path / "ready"


def test_the_manifest_tells_chats_and_how_much_of_them_is_learnt(ready, folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    documents = [chat_document(chat(i), tokenizer, CHATML) for i in range(60)]
    manifest = json.loads((ready / MANIFEST).read_text())
    assert manifest["chats"] == 60
    assert manifest["tokens"] == sum(len(d["tokens"]) for d in documents)
    assert manifest["learnt"] == sum(d["loss_weights"].sum() for d in documents)
    assert 0 < manifest["learnt"] < manifest["tokens"]


def test_truncated_missing_and_exchanged_shards_are_refused_by_name(ready):
    shards = sorted(ready.glob("shard-*"))
    last, content = shards[-1], shards[-1].read_bytes()
    for damaged in (content[:-1], content[:100], content + b"\0"):
        last.write_bytes(damaged)
        message = f"{last.name} has {len(damaged)} of {len(content)} bytes"
        with pytest.raises(BadFileError, match=message):
            open_source("prepared", str(ready))
    last.unlink()
    with pytest.raises(BadFileError, match=f"{last.name} is missing"):
        open_source("prepared", str(ready))
    assert len(content) == shards[0].stat().st_size  # else its size would tell
    shutil.copy(shards[1], last)
    source = open_source("prepared", str(ready))
    with pytest.raises(BadRecordError, match=rf"chats\.json:60: .*{last.name}"):
        source[59]


def test_flipped_bits_are_found_or_change_nothing(ready):
    good = open_source("prepared", str(ready))
    unread = pickle.dumps(good)
    wanted = [good[i] for i in range(10)]
    shard = ready / "shard-00000-of-00007.array_record"
    content = shard.read_bytes()
    rng = np.random.default_rng(0)
    refused = named = 0
    # Most of so small a file is padding that nothing reads.
    for at in rng.choice(np.flatnonzero(np.frombuffer(content, np.uint8)), 200):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.integers(8)
        shard.write_bytes(damaged)
        source = pickle.loads(unread)
        try:
            found = [source[i] for i in range(8)]  # those in this shard
        except BadRecordError as error:
            named += shard.name in str(error)
            refused += 1
            continue
        for a, b in zip(found, wanted, strict=False):
            for name, x in a.tokens.items():
                np.testing.assert_array_equal(x, b.tokens[name])
    assert named == refused > 20


def test_another_tokenizer_or_template_is_refused(ready, folder, tmp_path):
    keep_tokenizer(load_tokenizer(folder / "tokenizer"), tmp_path / "other")
    data = dict(source="prepared", path=str(ready), on_error="raise")
    data_of(tmp_path, tokenizer=str(tmp_path / "other"), **data)  # the same one elsewhere
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"prepared with another tok.* chat_template_sha256 was"):
        data_of(tmp_path, tokenizer=str(tmp_path / "other"), **data)
    make_tokenizer_json(tmp_path / "third", texts=("another text" * 9,))
    with pytest.raises(ValueError, match=r"prepared with another tokenizer .*: sha256 was"):
        data_of(tmp_path, tokenizer=str(tmp_path / "third"), **data)


def test_chats_are_written_by_the_template_that_is_given(folder, tmp_path):
    (tmp_path / "template").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    job = job_of("chats", folder, tmp_path / "out", chat_template=str(tmp_path / "template"))
    manifest = prepare(job, here)
    encode = load_tokenizer(folder / "tokenizer").encode
    texts = ["".join(turn["content"] for turn in chat(i)["messages"]) for i in range(60)]
    assert manifest["tokens"] == sum(len(encode(text)) - 1 for text in texts)


def test_what_is_prepared_is_of_the_split_asked_for(monkeypatch):
    def open_source(*_, split, **__):
        raise InterruptedError(f"asked for split {split}")

    monkeypatch.setattr(prepare_module, "open_source", open_source)
    job = Job(source="tfds", path="a dataset", split="test", tokenizer="bytes", output="nowhere")
    with pytest.raises(InterruptedError, match="asked for split test"):
        prepare(job, here)


def test_texts_do_not_depend_on_the_chat_template(folder, tmp_path):
    prepare(job_of("text", folder, tmp_path / "texts"), here)
    keep_tokenizer(load_tokenizer(folder / "tokenizer"), tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    data = dict(source="prepared", path=str(tmp_path / "texts"), on_error="raise")
    assert data_of(tmp_path, tokenizer=str(tmp_path / "other"), **data).tokenizer.chat_template


def test_parts_of_a_mixture_that_were_prepared_with_different_tokenizers_are_refused(
    ready, folder, tmp_path
):
    make_tokenizer_json(tmp_path / "third", texts=("another text" * 9,))
    job = job_of("text", folder, tmp_path / "texts", tokenizer=f"{tmp_path}/third")
    prepare(job, here)
    parts = {
        path.name: {"weight": 1.0, "source": "prepared", "path": str(path)}
        for path in (ready, tmp_path / "texts")
    }
    with pytest.raises(ValueError, match=r"texts was prepared with another tokenizer"):
        data_of(tmp_path, source="mixture", mixture=parts, tokenizer="", on_error="raise")


def test_what_was_begun_otherwise_is_not_gone_on_with(ready, folder):
    changed = job_of("chats", folder, ready, num_shards=8)
    with pytest.raises(ValueError, match=r"prepared otherwise.*\n.*num_shards: was 7, now 8"):
        prepare(changed, here)
    before = contents(ready)
    prepare(job_of("chats", folder, ready), here)
    assert contents(ready) == before


def test_a_source_that_changed_meanwhile_is_refused(folder, tmp_path):
    shutil.copy(folder / "a.jsonl", tmp_path / "a.jsonl")
    job = dataclasses.replace(job_of("jsonl", folder, tmp_path / "out"), path=f"{tmp_path}/*.jsonl")

    class Stop(Exception):
        pass

    def one(job, shards, done):
        make_shard(job, 0)
        raise Stop

    with pytest.raises(Stop):
        prepare(job, one)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"prepared otherwise.*\n.*source: was"):
        prepare(job, here)
    shutil.copy(folder / "a.jsonl", tmp_path / "a.jsonl")
    os.utime(tmp_path / "a.jsonl", (1, 1))  # as long as before, and perhaps written anew
    with pytest.raises(ValueError, match=r"prepared otherwise.*\n.*source: was"):
        prepare(job, here)


def test_a_dataset_of_tfds_that_was_made_anew_is_refused(folder, tmp_path):
    texts = corpora.make_texts(30)
    given = corpora.write("tfds", tmp_path / "data", texts)
    tokenizer, output = f"{folder}/tokenizer", tmp_path / "out"
    job = Job(**given, tokenizer=tokenizer, output=str(output), num_shards=2, on_error="skip")
    prepare(job, here)
    before = contents(output)
    prepare(job, here)
    assert contents(output) == before
    shutil.rmtree(tmp_path / "data")
    assert corpora.write("tfds", tmp_path / "data", [text + "." for text in texts]) == given
    for file in pathlib.Path(given["path"]).iterdir():
        os.utime(file, (1, 1))  # they may be as long, and of the same second
    with pytest.raises(ValueError, match=r"prepared otherwise.*\n.*source: was"):
        prepare(job, here)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_is_named_and_what_is_finished_stays(workers, folder, tmp_path):
    given = ["--source=jsonl", f"--path={folder}/*.jsonl", f"--tokenizer={folder}/tokenizer",
             "--num_shards=3", f"--output={tmp_path}", f"--workers={workers}"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"a\.jsonl:8: is no JSON.*\n.*goes on from there"):
        main(given)
    assert not (tmp_path / MANIFEST).exists()
    assert (tmp_path / "shard-00002-of-00003.array_record").exists()
    made = (tmp_path / "shard-00002-of-00003.array_record").stat().st_mtime_ns
    main([*given, "--on_error=skip"])
    assert (tmp_path / "shard-00002-of-00003.array_record").stat().st_mtime_ns == made
    assert json.loads((tmp_path / MANIFEST).read_text())["skipped"] == 3
    with pytest.raises(SystemExit, match="on_error: was 'skip', now 'raise'"):
        main(given)


def die(job, k):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_as_one_and_notes_without_content_count_for_nothing(
    folder, tmp_path, monkeypatch
):
    given = ["--source=jsonl", f"--path={folder}/*.jsonl", f"--tokenizer={folder}/tokenizer",
             "--num_shards=3", "--on_error=skip", f"--output={tmp_path}"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "make_shard", die)
        with pytest.raises(SystemExit, match=r"killed, perhaps for lack of memory: .* --workers"):
            main([*given, "--workers=2"])
    # As after a power cut.
    (tmp_path / "shard-00001-of-00003.array_record").touch()
    (tmp_path / "shard-00001-of-00003.array_record.json").touch()
    main([*given, "--workers=1"])
    assert json.loads((tmp_path / MANIFEST).read_text())["skipped"] == 3
    (tmp_path / MANIFEST).write_text("")
    with pytest.raises(SystemExit, match=f"{MANIFEST} cannot be read .* begin anew"):
        main([*given, "--workers=1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_shards": 61}, "--num_shards=61 must lie between 1 and the number of records, 60"),
        ({"num_shards": -1}, "--num_shards=-1 must lie between"),
        ({"path": "/nowhere/*.jsonl"}, "matches no file"),
        ({"tokenizer": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_impossible_values_are_refused(change, message, folder, tmp_path):
    job = dataclasses.replace(job_of("chats", folder, tmp_path / "out"), **change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(job, here)
    assert not (tmp_path / "out").exists()


def test_texts_of_which_every_record_is_skipped_are_refused(folder, tmp_path):
    given = ["--source=jsonl", f"--path={folder}/*.jsonl", "--field=content", "--on_error=skip",
             f"--tokenizer={folder}/tokenizer", f"--output={tmp_path}", "--workers=1"]  # fmt: skip
    with pytest.raises(
        SystemExit, match=r"All \d+ records were skipped, .* has no field 'content'"
    ):
        main(given)
    assert not (tmp_path / MANIFEST).exists()


def test_a_reason_that_utf8_cannot_encode_is_kept():
    packed = msgpack.unpackb(encode_error("a", "role \ud83d"))
    assert packed["error"] == r"role \ud83d"


def test_a_record_says_only_what_is_needed():
    """So that a text's token takes little more than its four bytes."""
    document = {
        "tokens": np.arange(100, dtype=np.int32),
        "targets": np.arange(1, 101, dtype=np.int32),
        "loss_weights": np.ones(100, np.float32),
    }
    assert len(encode_document("a.jsonl:17", document)) < 4 * 101 + 32
    assert len(encode_error("a.jsonl:17", "is no JSON")) < 50
    assert os.path.basename(MANIFEST) == "manifest.json"
