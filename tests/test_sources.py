"""Every source gives what was written, by number; what is wrong is an error or a counted skip."""

import gzip
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import corpora
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from qwen3next_jax.config import SOURCES
from qwen3next_jax.data import files
from qwen3next_jax.data.files import BadFileError
from qwen3next_jax.data.holdout import split_source
from qwen3next_jax.data.sources import BadRecordError, open_source

ODD = "\ttab\r\nCRLF, naïve ▁ 日本語, no end of line"
TEXTS = [f"text {i}, {'x' * (i * 37 % 200)}\n" for i in range(39)] + [ODD]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qwen3next_jax" / "unpacked"


def texts_of(records):
    return [records[i].text for i in range(len(records))]


@pytest.mark.parametrize("source", [source for source, path in SOURCES.items() if path])
def test_every_source_that_a_config_may_name_is_known(source):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (of many kinds, but not of this one)
        open_source(source, "/nowhere/*")
    assert "is unknown" not in str(caught.value)


@pytest.mark.parametrize("kind", corpora.WRITTEN)
def test_every_source_gives_the_texts_that_were_written(kind, tmp_path):
    source = open_source(**corpora.write(kind, tmp_path / "corpus", TEXTS))
    found = texts_of(source)
    assert sorted(found) == sorted(TEXTS) if kind == "tfds" else found == TEXTS
    order = random.Random(0).sample(range(40), 40)
    with ThreadPoolExecutor(4) as pool:
        assert [record.text for record in pool.map(source.__getitem__, order)] == [
            found[i] for i in order
        ]
    assert texts_of(pickle.loads(pickle.dumps(source))) == found
    names = [source[i].name for i in range(40)]
    assert len(set(names)) == 40
    for index in (-1, 40):
        with pytest.raises(IndexError):
            source[index]


def test_records_are_named_by_their_file_and_their_number_from_one(tmp_path):
    for folder in ("a", "b/c"):
        corpora.write("jsonl", tmp_path / folder, TEXTS[:3], files=2)
    source = open_source("jsonl", f"{tmp_path}/**/*.jsonl")
    expected = [
        f"{folder}/{name}"
        for folder in ("a", "b/c")
        for name in ("0.jsonl:1", "0.jsonl:2", "1.jsonl:1")
    ]
    assert [source[i].name for i in range(len(source))] == expected
    corpora.write("text", tmp_path / "text", TEXTS[:2])
    assert open_source("text", f"{tmp_path}/text/*.txt")[1].name == "001.txt"


@pytest.mark.parametrize("kind", ["text", "jsonl", "gzip", "parquet", "array_record"])
def test_cloud_paths_are_read(kind, tmp_path, monkeypatch):
    # What epath takes for the cloud is a dictionary here.
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: MemoryFileSystem())
    given = corpora.write(kind, tmp_path / "corpus", TEXTS)
    bucket = epath.Path("s3://bucket/corpus")
    bucket.mkdir(parents=True)
    for file in (tmp_path / "corpus").iterdir():
        (bucket / file.name).write_bytes(file.read_bytes())
    given["path"] = given["path"].replace(str(tmp_path / "corpus"), "s3://bucket/corpus")
    assert texts_of(open_source(**given)) == TEXTS
    bucket.rmtree()


def test_messages_and_their_tools_are_read_from_json_and_parquet(tmp_path):
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "c"}],
    ]
    tools = [{"type": "function"}]
    lines = [{"messages": chats[0], "tools": tools}, {"messages": chats[1], "tools": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "a.parquet")
    for source in ("jsonl", "parquet"):
        opened = open_source(source, f"{tmp_path}/a.{source}", field="messages")
        assert [opened[i].messages for i in (0, 1)] == chats
        assert [opened[i].tools for i in (0, 1)] == [tools, None]
        assert opened[0].text is None


def test_a_row_of_parquet_has_no_keys_that_only_other_rows_have(tmp_path):
    def chat(**arguments):
        call = {"role": "assistant", "content": None, "tool_calls": [{"arguments": arguments}]}
        return {"messages": [call], "tools": [{"properties": arguments}]}

    chats = [chat(city="Cologne"), chat(path="a", content="b")]
    chats[1]["messages"][0]["content"] = "I write."
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    source = open_source("parquet", f"{tmp_path}/a.parquet", field="messages")
    assert [{"messages": r.messages, "tools": r.tools} for r in (source[0], source[1])] == chats


def test_files_whose_owner_has_no_name_are_read(tmp_path, monkeypatch):
    def no_such_user(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", no_such_user)
    for kind in ("jsonl", "gzip", "parquet"):
        assert texts_of(open_source(**corpora.write(kind, tmp_path / kind, TEXTS))) == TEXTS


def test_a_copy_is_of_the_file_and_not_of_one_with_its_relative_path(tmp_path, monkeypatch):
    for name in ("one", "two"):
        given = corpora.write("gzip", tmp_path / name / "data", [name], files=1)
        file = tmp_path / name / "data" / "0.jsonl.gz"
        os.utime(file, (0, 0))
        monkeypatch.chdir(tmp_path / name)
        assert texts_of(open_source(**{**given, "path": "data/*.gz"})) == [name]


def test_a_file_whose_name_is_no_text_is_an_error_or_a_counted_skip(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("b")
    with pytest.raises(BadFileError, match=r"caf.*its name is no UTF-8; rename it"):
        open_source("text", f"{tmp_path}/*.txt")
    source = open_source("text", f"{tmp_path}/*.txt", on_error="skip")
    assert texts_of(source) == ["a"]
    assert len(source.skipped_files) == 1


@pytest.mark.parametrize(("hard", "expected"), [(4096, "40 good"), (30, "OSError: [Errno 24]")])
def test_too_many_open_files_are_no_bad_records(hard, expected, tmp_path):
    given = corpora.write("array_record", tmp_path / "corpus", TEXTS, files=40)
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (30, {hard}))
from qwen3next_jax.data.sources import BadRecordError, open_source
source = open_source(**{given!r}, on_error="skip")
good = 0
for i in range(len(source)):
    try:
        good += source[i].text is not None
    except BadRecordError:
        pass
print(good, "good")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert expected in run.stdout + run.stderr, run.stderr


def test_array_records_of_objects_are_read(tmp_path):
    corpora.write_array_record(tmp_path / "a.array_record", ['{"text": "one"}', "no JSON"])
    source = open_source("array_record", f"{tmp_path}/*", field="text")
    assert source[0].text == "one"
    with pytest.raises(BadRecordError, match=r"a\.array_record:2: is no JSON.*data\.field=''"):
        source[1]


def test_what_is_packed_is_unpacked_once_and_again_when_it_changes(tmp_path, cache):
    given = corpora.write("gzip", tmp_path / "corpus", TEXTS, files=1)
    open_source(**given)
    (copy,) = cache.iterdir()
    written = copy.stat().st_mtime_ns
    assert copy.read_text() == corpora.json_lines(TEXTS)
    open_source(**given)
    assert copy.stat().st_mtime_ns == written
    corpora.write_packed(tmp_path / "corpus" / "0.jsonl.gz", TEXTS[:7], gzip.compress)
    assert texts_of(open_source(**given)) == TEXTS[:7]


def test_a_file_of_the_same_length_and_another_time_is_unpacked_again(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for seconds, text in enumerate(("one", "two")):
        path.write_bytes(gzip.compress(corpora.json_lines([text]).encode(), compresslevel=0))
        os.utime(path, (seconds, seconds))
        assert texts_of(open_source("jsonl", str(path))) == [text]


def test_several_fields_of_one_file_are_not_confused(tmp_path):
    table = pyarrow.table({"text": ["a text"], "body": ["a body"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for field in ("text", "body"):
        source = open_source("parquet", f"{tmp_path}/a.parquet", field=field)
        assert texts_of(source) == [f"a {field}"]


@pytest.mark.parametrize("kind", ["jsonl", "gzip", "zstd"])
def test_lines_are_found_whatever_is_read_at_a_time(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SCANNED", 64)  # some lines have fewer bytes, others more
    assert texts_of(open_source(**corpora.write(kind, tmp_path / "corpus", TEXTS))) == TEXTS


def test_processes_of_one_number_unpack_a_file_at_one_time(tmp_path, cache, monkeypatch):
    given = corpora.write("gzip", tmp_path / "corpus", TEXTS, files=1)
    copy_all = shutil.copyfileobj

    def copy_while_another_does(file, target, length):
        target.write(file.read(10))
        monkeypatch.setattr(shutil, "copyfileobj", copy_all)
        assert texts_of(open_source(**given)) == TEXTS
        copy_all(file, target, length)

    monkeypatch.setattr(shutil, "copyfileobj", copy_while_another_does)
    assert texts_of(open_source(**given)) == TEXTS
    (copy,) = cache.iterdir()
    assert copy.read_text() == corpora.json_lines(TEXTS)


def test_synthetic_documents_are_a_function_of_their_number():
    first, second = open_source("synthetic", ""), open_source("synthetic", "")
    assert len(first) == 100_000
    for i in (0, 1, 99_999):
        assert first[i].text == second[i].text
    words = [word for i in range(200) for word in first[i].text.split()]
    assert len(set(words)) > 1000
    assert first[0].text != first[1].text


def test_the_library_is_read_without_tests_empty_files_and_installed_packages(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for folder in ("json", "json/tests", "test", "idlelib/idle_test", "site-packages/numpy"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "one.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("no source")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "klingon.py").write_bytes(b"# coding: klingon\n")
    source = open_source("stdlib", "")
    assert [file.name for file in source.files] == ["json/one.py", "klingon.py", "latin.py"]
    assert source[2].text == "# coding: latin-1\nx = 'é'\n"
    with pytest.raises(BadRecordError, match=r"klingon\.py: cannot be decoded: .*klingon"):
        source[1]


def test_this_python_has_a_library_of_which_every_file_can_be_read():
    source = open_source("stdlib", "")
    records = {source[i].name: source[i].text for i in range(len(source))}
    path = Path(sysconfig.get_paths()["stdlib"], "tokenize.py")
    assert records["tokenize.py"] == path.read_bytes().decode()
    assert "json/decoder.py" in records


def test_the_library_is_a_dataset_of_tfds_as_well(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    from qwen3next_jax.data.python_standard_library import PythonStandardLibrary

    builder = PythonStandardLibrary(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    dataset = open_source("tfds", str(builder.data_dir))
    library = open_source("stdlib", "")
    assert sorted(texts_of(dataset)) == sorted(texts_of(library))
    # It is known by its name where the data is.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    found = tfds.data_source("python_standard_library", split="train[:10]", data_dir=str(tmp_path))
    assert len(found) == 10


def test_a_dataset_keeps_its_split_where_it_is_copied_to_and_where_it_is_cut_short(tmp_path):
    given = corpora.write("tfds", tmp_path / "corpus", TEXTS)
    # TFDS knows a dataset by the last two folders.
    copy = tmp_path / "elsewhere" / "texts" / "1.0.0"
    shutil.copytree(given["path"], copy)
    whole = open_source("tfds", given["path"])
    moved, short = (open_source("tfds", str(copy), split=s) for s in ("train", "train[:25]"))
    assert [moved.name(i) for i in range(40)] == [whole.name(i) for i in range(40)]
    assert [short.name(i) for i in range(25)] == [whole.name(i) for i in range(25)]
    assert short[24].text == whole[24].text
    last = open_source("tfds", given["path"], split="train[25:]")
    assert {last.name(i) for i in range(15)}.isdisjoint(whole.name(i) for i in range(40))


BAD_LINES = [
    (b'{"text": "a"', r"is no JSON"),
    (b"", r"is no JSON"),
    (b'{"content": "a"}', r"has no field 'text'; its fields are \['content'\]"),
    (b'{"text": 3}', r"field 'text' is 3; expected a string, or a list of messages"),
    (b'{"text": null}', r"field 'text' is None"),
    (b'["a"]', r"expected an object with a field 'text', found \['a'\]"),
    (b'{"text": "\xff"}', r"is no UTF-8: byte 0xff at 10"),
    (b'{"text": "a", "b": ' + b"[" * 10**5, r"is no JSON: maximum recursion depth"),
]


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_messages_written_as_text_are_refused(field, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({field: '[{"role": "user"}]'}))
    source = open_source("jsonl", f"{tmp_path}/a.jsonl", field=field)
    with pytest.raises(BadRecordError, match=rf"field '{field}' is .* a list of messages"):
        source[0]


def test_a_text_is_no_chat(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": "hi"}))
    source = open_source("jsonl", f"{tmp_path}/a.jsonl", field="messages")
    with pytest.raises(BadRecordError, match=r"field 'messages' is 'hi'; expected a list of mess"):
        source[0]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_with_what_is_wrong(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}\n')
    source = open_source("jsonl", f"{tmp_path}/a.jsonl")
    assert [source[i].text for i in (0, 2)] == ["good", "too"]
    with pytest.raises(BadRecordError, match=rf"a\.jsonl:2: {message}"):
        source[1]


def test_bytes_that_are_no_utf8_are_named_in_every_format(tmp_path):
    bad = b"ab\xffc"
    (tmp_path / "a.txt").write_bytes(bad)
    array = pyarrow.array([b"good", bad], pyarrow.binary()).view(pyarrow.utf8())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
    writer = corpora.array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "")
    writer.write(b"good")
    writer.write(bad)
    writer.close()
    for source, name in (
        ("text", "a.txt"),
        ("parquet", "a.parquet:2"),
        ("array_record", "a.array_record:2"),
    ):
        field = "" if source == "array_record" else "text"
        opened = open_source(source, f"{tmp_path}/{name.split(':')[0]}", field=field)
        with pytest.raises(BadRecordError, match=rf"{name}: is no UTF-8: byte 0xff at 2"):
            opened[len(opened) - 1]


def test_a_row_of_parquet_that_is_no_utf8_stays_one_record(tmp_path):
    rows = [b"one", b'\xff\nline two\n{"text": "no record"}', b"three"]
    column = pyarrow.array(rows, pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    source = open_source("parquet", f"{tmp_path}/a.parquet")
    assert [len(source), source[0].text, source[2].text] == [3, "one", "three"]
    with pytest.raises(BadRecordError, match=r"a\.parquet:2: is no UTF-8"):
        source[1]


def test_bytes_within_a_message_of_parquet_are_text(tmp_path):
    message = pyarrow.struct({"role": pyarrow.binary(), "content": pyarrow.binary()})
    column = pyarrow.array([[{"role": b"user", "content": "é".encode()}]], pyarrow.list_(message))
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    source = open_source("parquet", f"{tmp_path}/a.parquet", field="messages")
    assert source[0].messages == [{"role": "user", "content": "é"}]


def test_brackets_at_the_beginning_are_text_however_many(tmp_path):
    text = "[" * 10**5
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": text}))
    assert open_source("jsonl", f"{tmp_path}/a.jsonl", field="content")[0].text == text


def test_a_mark_of_the_byte_order_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ufeff", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\n', encoding="utf-8")
    assert open_source("text", f"{tmp_path}/a.txt")[0].text == "one\ufeff"
    assert open_source("jsonl", f"{tmp_path}/a.jsonl")[0].text == "one"


def test_names_of_compressed_files_may_be_long_or_in_capitals(tmp_path):
    content = gzip.compress(b'{"text": "one"}')
    for name in ("n" * 240 + ".jsonl.gz", "N.JSONL.GZ"):
        (tmp_path / name).write_bytes(content)
        assert open_source("jsonl", f"{tmp_path}/{name}")[0].text == "one"
    (tmp_path / "a.jsonl.bz2").write_bytes(content)
    with pytest.raises(BadFileError, match=r"compressed as \.bz2, which is not read; pack it as"):
        open_source("jsonl", f"{tmp_path}/a.jsonl.bz2")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (
            "text",
            "a.txt.gz",
            r"is compressed \(\.gz\) by its name, and is not read as text; unpack",
        ),
        ("text", "a.parquet", r"is a Parquet file by its name; set data\.source='parquet'"),
        ("jsonl", "a.PARQUET", r"is a Parquet file by its name; set data\.source='parquet'"),
    ],
)
def test_files_of_another_kind_are_refused_by_their_names(source, name, message, tmp_path):
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(BadFileError, match=message):
        open_source(source, f"{tmp_path}/{name}")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_without_any_bytes_is_refused(ending, tmp_path, cache):
    (tmp_path / f"a.jsonl{ending}").touch()
    with pytest.raises(BadFileError, match="is empty; compressed, even an empty file has some"):
        open_source("jsonl", f"{tmp_path}/a.jsonl{ending}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gzip", "is truncated or no gzip"),
        ("zstd", "is a truncated zstd file"),
        ("parquet", "is truncated or no Parquet"),
        ("array_record", "is truncated or no ArrayRecord"),
    ],
)
def test_a_truncated_file_is_an_error_or_a_counted_skip(kind, message, tmp_path, cache):
    given = corpora.write(kind, tmp_path / "corpus", TEXTS)
    file = sorted((tmp_path / "corpus").iterdir())[1]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BadFileError, match=rf"{file}: {message}"):
        open_source(**given)
    source = open_source(**given, on_error="skip")
    assert texts_of(source) == TEXTS[:14] + TEXTS[28:]
    assert len(source.skipped_files) == 1
    assert str(file) in source.skipped_files[0]
    if cache.exists():
        assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_an_empty_glob_is_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match=r"data\.path='.*\*\.txt' matches no file"):
            open_source("text", f"{tmp_path}/*.txt", on_error=on_error)
    with pytest.raises(ValueError, match=r"is a folder; give a glob .*folder\.txt/\*\*/\*\.txt'"):
        open_source("text", f"{tmp_path}/folder.txt")
    (tmp_path / "a [1].txt").write_text("a text")
    with pytest.raises(ValueError, match=r"matches no file; its brackets .*/a \[\[\]1\]\.txt'"):
        open_source("text", f"{tmp_path}/a [1].txt")
    assert len(open_source("text", f"{tmp_path}/a [[]1].txt")) == 1
    with pytest.raises(ValueError, match=r"matches no file; give the folder of '~' itself: '/"):
        open_source("text", "~/no folder/*.txt")
    for nothing in ("", "."):
        with pytest.raises(ValueError, match=rf"data\.path='{nothing}' matches no file"):
            open_source("text", nothing)


def test_files_without_a_record_are_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"The 1 files of data\.source='jsonl'.*hold no record"):
        open_source("jsonl", f"{tmp_path}/*.jsonl")


def test_a_folder_without_permission_is_an_error_or_a_counted_skip(tmp_path, monkeypatch):
    corpora.write("text", tmp_path / "a", TEXTS[:3])
    corpora.write("text", tmp_path / "b", TEXTS[3:5])
    locked = tmp_path / "b"
    locked.chmod(0)
    if os.geteuid() == 0:  # to whom nothing is forbidden
        iterdir = type(epath.Path(locked)).iterdir

        def iterdir_as_another(path):
            if path == epath.Path(locked):
                raise PermissionError(13, "Permission denied")
            return iterdir(path)

        monkeypatch.setattr(type(epath.Path(locked)), "iterdir", iterdir_as_another)
    with pytest.raises(BadFileError, match=rf"{locked}: Permission denied"):
        open_source("text", f"{tmp_path}/**/*.txt")
    source = open_source("text", f"{tmp_path}/**/*.txt", on_error="skip")
    assert texts_of(source) == TEXTS[:3]
    assert source.skipped_files == (f"{locked}: Permission denied",)
    locked.chmod(0o755)


@pytest.mark.parametrize(
    "pattern",
    ["*.txt", "**/*.txt", "a/**/*.txt", "a/*/x.txt", "**/x.*", "a/b/x.txt", "[ab]/*", "**", "a/**"],
)
def test_globs_match_what_pythons_own_do(pattern, tmp_path):
    import glob

    for name in (
        "x.txt",
        "a/x.txt",
        "a/b/x.txt",
        "a/b/y.txt",
        "a/.hidden/x.txt",
        "b/.x.txt",
        "b/z.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    expected = {p for p in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if os.path.isfile(p)}
    source = open_source("text", f"{tmp_path}/{pattern}")
    folder = str(tmp_path / pattern.split("/**")[0].split("*")[0]).rstrip("[ab]/")
    assert len(source) == len(expected)
    assert all(any(p.endswith(file.name) for p in expected) for file in source.files), folder


def test_unknown_sources_and_datasets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.source='web' is unknown; expected one of stdlib,"):
        open_source("web", "x")
    with pytest.raises(ValueError, match=r"'stdlib' takes no path; leave out '/corpus/\*.py'"):
        open_source("stdlib", "/corpus/*.py")
    with pytest.raises(BadFileError, match=r"data\.path='no_such_dataset', .* cannot be opened as"):
        open_source("tfds", "no_such_dataset")


# What is held out.


def write_lines(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(corpora.json_lines(map(str, range(count))))


def names(part):
    return {part[i].name for i in range(len(part))}


def test_parts_are_disjoint_and_together_all_records(tmp_path):
    write_lines(tmp_path / "a" / "x.jsonl", 30)
    write_lines(tmp_path / "b" / "y.jsonl", 30)
    source = open_source("jsonl", f"{tmp_path}/*/*.jsonl")
    train, held_out = split_source(source, 0.5)
    assert len(train) + len(held_out) == 60
    assert names(train).isdisjoint(names(held_out))
    assert names(train) | names(held_out) == names(source)
    for part in (train, held_out):
        with pytest.raises(IndexError):
            part[len(part)]


def test_a_record_keeps_its_part_when_others_come_and_the_corpus_moves(tmp_path):
    write_lines(tmp_path / "old" / "m.jsonl", 20)
    for name in "amz":
        write_lines(tmp_path / "elsewhere" / "new" / f"{name}.jsonl", 60)
    old = split_source(open_source("jsonl", f"{tmp_path}/old/*.jsonl"), 0.5)
    new = split_source(open_source("jsonl", f"{tmp_path}/elsewhere/new/*.jsonl"), 0.5)
    assert names(old[1]) == names(new[1]) & (names(old[0]) | names(old[1]))


def test_the_split_is_the_same_on_every_machine(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text("text")
    # `printf 1.txt | b2sum -l 64` starts with 27, 7.txt with 30, the others with 59 and above;
    # a quarter ends at 40.
    held_out = split_source(open_source("text", f"{tmp_path}/*.txt"), 0.25)[1]
    assert names(held_out) == {"1.txt", "7.txt"}

    def mix(x):  # splitmix64 in Python's own integers
        mask = 2**64 - 1
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    write_lines(tmp_path / "a.jsonl", 50)
    file = int(hashlib.blake2b(b"a.jsonl", digest_size=8).hexdigest(), 16)
    expected = {f"a.jsonl:{n}" for n in range(1, 51) if mix(file ^ mix(n)) / 2**64 < 0.25}
    held_out = split_source(open_source("jsonl", f"{tmp_path}/*.jsonl"), 0.25)[1]
    assert names(held_out) == expected
    assert len(expected) > 3


def test_a_larger_fraction_only_adds_to_the_held_out_part(tmp_path):
    write_lines(tmp_path / "a.jsonl", 2000)
    source = open_source("jsonl", f"{tmp_path}/*.jsonl")
    held_out = [names(split_source(source, fraction)[1]) for fraction in (0.05, 0.2, 0.6)]
    assert held_out[0] < held_out[1] < held_out[2]
    # Binomial: standard deviations are 0.005, 0.009 and 0.011 of the 2000; four of them pass.
    shares = np.array([len(part) / 2000 for part in held_out])
    np.testing.assert_allclose(shares, [0.05, 0.2, 0.6], atol=0.044)


@pytest.mark.parametrize(("fraction", "part"), [(0.0, "held-out"), (1.0, "training")])
def test_an_empty_part_is_refused(tmp_path, fraction, part):
    write_lines(tmp_path / "a.jsonl", 5)
    with pytest.raises(ValueError, match=rf"={fraction} leaves none of the 5 .* the {part} part"):
        split_source(open_source("jsonl", f"{tmp_path}/*.jsonl"), fraction)
    (tmp_path / "a.txt").write_text("a book")
    with pytest.raises(ValueError, match=r"a single record, which cannot be divided .* JSONL"):
        split_source(open_source("text", f"{tmp_path}/*.txt"), 0.5)
    (tmp_path / "mac.jsonl").write_text('{"text": "a"}\r{"text": "b"}\r')
    with pytest.raises(BadRecordError, match=r"mac\.jsonl"):
        split_source(open_source("jsonl", f"{tmp_path}/mac.jsonl"), 0.5)


@pytest.mark.parametrize(
    ("kind", "module"),
    [("parquet", "pyarrow"), ("zstd", "zstandard"), ("tfds", "tensorflow_datasets")],
)
def test_a_missing_library_is_named_with_what_installs_it(kind, module, tmp_path, monkeypatch):
    given = corpora.write(kind, tmp_path / "corpus", TEXTS[:5])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"^{module} is needed .*'qwen3next_jax\[data\]'"):
        open_source(**given)
