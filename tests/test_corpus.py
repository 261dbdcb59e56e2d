"""Which files become documents, and that a document's part never changes."""

import sysconfig
from pathlib import Path

import pytest

from qwen3next_jax.data.corpus import Document, read_corpus, split


def write_texts(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"text {i}\n")


def read_texts(path, holdout_fraction=0.5):
    return read_corpus(source="text", path=str(path), holdout_fraction=holdout_fraction)


def names(documents):
    return {document.name for document in documents}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library."""
    for i in range(20):
        (tmp_path / f"module{i}.py").write_text(f"x = {i}\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def read_library():
    corpus = read_corpus(source="stdlib", path="", holdout_fraction=0.5)
    return corpus, {document.name: document.text for document in corpus.train + corpus.held_out}


def test_parts_are_disjoint_and_together_all_documents(tmp_path):
    write_texts(tmp_path / "a", 30)
    write_texts(tmp_path / "b", 30)
    corpus = read_texts(tmp_path / "**" / "*.txt")
    assert names(corpus.train).isdisjoint(names(corpus.held_out))
    assert names(corpus.train) | names(corpus.held_out) == {
        f"{folder}/{i}.txt" for folder in "ab" for i in range(30)
    }


def test_a_document_keeps_its_part_when_others_come_and_the_corpus_moves(tmp_path):
    write_texts(tmp_path / "old", 20)
    write_texts(tmp_path / "elsewhere" / "new", 60)
    old = read_texts(tmp_path / "old" / "*.txt")
    new = read_texts(tmp_path / "elsewhere" / "new" / "*.txt")
    assert names(old.held_out) == names(new.held_out) & names(old.train + old.held_out)


def test_the_split_is_the_same_on_every_machine():
    documents = [Document(f"{i}.txt", "") for i in range(12)]
    _, held_out = split(documents, 0.25)
    # `printf 1.txt | b2sum -l 64` starts with 27, 7.txt with 30, the others with 59 and above;
    # a quarter ends at 40.
    assert names(held_out) == {"1.txt", "7.txt"}


def test_a_larger_fraction_only_adds_to_the_held_out_part():
    documents = [Document(f"{i}", "") for i in range(2000)]
    held_out = [names(split(documents, fraction)[1]) for fraction in (0.05, 0.2, 0.6)]
    assert held_out[0] < held_out[1] < held_out[2]
    # Binomial: standard deviations are 0.005, 0.009 and 0.011 of the 2000; four of them pass.
    assert [len(part) / 2000 for part in held_out] == pytest.approx([0.05, 0.2, 0.6], abs=0.044)


def test_text_is_kept_to_the_byte(tmp_path):
    write_texts(tmp_path, 20)
    odd = "\ttab\r\nCRLF, naïve ▁, no end of line"
    (tmp_path / "0.txt").write_bytes(odd.encode())
    corpus = read_texts(tmp_path / "*.txt")
    assert Document("0.txt", odd) in corpus.train + corpus.held_out


def test_library_is_read_without_tests_and_installed_packages(library):
    for folder in ("json", "json/tests", "test", "idlelib/idle_test", "site-packages/numpy"):
        (library / folder).mkdir(parents=True)
        (library / folder / "one.py").write_text("x = 1\n")
    (library / "notes.txt").write_text("no source")
    _, texts = read_library()
    assert set(texts) == {f"module{i}.py" for i in range(20)} | {"json/one.py"}


def test_library_source_is_decoded_as_it_declares(library):
    (library / "latin.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    corpus, texts = read_library()
    assert texts["latin.py"] == "# coding: latin-1\nx = 'é'\n"
    assert corpus.undecodable == []


def test_undecodable_files_are_named(library):
    (library / "bytes.py").write_bytes(b"x = '\xff'\n")
    (library / "unknown.py").write_bytes(b"# coding: klingon\n")
    corpus, texts = read_library()
    assert corpus.undecodable == ["bytes.py", "unknown.py"]
    assert len(texts) == 20


def test_this_python_has_a_library():
    corpus = read_corpus(source="stdlib", path="", holdout_fraction=0.05)
    documents = corpus.train + corpus.held_out
    assert {"tokenize.py", "json/decoder.py"} <= names(documents)
    source = Path(sysconfig.get_paths()["stdlib"], "tokenize.py").read_text()
    assert Document("tokenize.py", source) in documents


@pytest.mark.parametrize(("fraction", "part"), [(0.0, "held-out"), (1.0, "training")])
def test_an_empty_part_is_refused(tmp_path, fraction, part):
    write_texts(tmp_path, 5)
    with pytest.raises(ValueError, match=rf"={fraction} leaves none of the 5 .* the {part} part"):
        read_texts(tmp_path / "*.txt", fraction)


def test_an_empty_glob_is_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"data\.path='.*\*\.txt' matches no file"):
        read_texts(tmp_path / "*.txt")


def test_a_corpus_of_undecodable_files_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="None of the 1 files"):
        read_texts(tmp_path / "*.txt")


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"data\.source='web' is unknown; expected 'stdlib'"):
        read_corpus(source="web", path="", holdout_fraction=0.5)
