"""The documents of a run, split by file into a training and a held-out part.

What is held out must stay so: when a run goes on, when files come or go, when the corpus moves to
another folder. So a document's part follows from its name alone. The name, relative to the corpus,
is hashed to a number in [0, 1), and the document is held out where that is below
`holdout_fraction`. Raising the fraction only adds to the held-out part.

All texts are kept in memory.
"""

import dataclasses
import glob
import hashlib
import io
import itertools
import pathlib
import sysconfig
import tokenize
from collections.abc import Callable
from typing import NamedTuple

from absl import logging

# Folders of the standard library that are not part of it, or whose odd files test Python itself.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Document(NamedTuple):
    """The text of one file."""

    name: str  # relative to the corpus, with forward slashes
    text: str  # as decoded: line ends and tabs are kept


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both parts in the order of their names, and the names of files that could not be decoded."""

    train: list[Document]
    held_out: list[Document]
    undecodable: list[str]


def read_corpus(*, source: str, path: str, holdout_fraction: float) -> Corpus:
    """Reads and splits the documents.

    Args:
      source: "stdlib", the .py files of the running Python's own library, each in the encoding that
        it declares; or "text", the UTF-8 files that `path` matches.
      path: a glob in which `**` stands for any folders; "" for "stdlib".
      holdout_fraction: share of the documents held out, in expectation.

    Raises:
      ValueError: the source is unknown, no file was found or none could be decoded, or a part of
        the split is empty.
    """
    decode: Callable[[bytes], str]
    if source == "stdlib":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files, decode = _library_files(root), _decode_python
    elif source == "text":
        root, files, decode = _fixed_folder(path), _matching_files(path), bytes.decode
    else:
        raise ValueError(f"data.source={source!r} is unknown; expected 'stdlib' or 'text'")
    documents, undecodable = _read(root, files, decode)
    if undecodable:
        logging.warning(
            "%d of %d files cannot be decoded and are left out: %s",
            len(undecodable), len(undecodable) + len(documents), ", ".join(undecodable),
        )  # fmt: skip
    if not documents:
        raise ValueError(
            f"None of the {len(undecodable)} files of data.source={source!r} in {root} can be "
            "decoded; convert them to UTF-8 or choose another data.path"
        )
    train, held_out = split(documents, holdout_fraction)
    return Corpus(train, held_out, undecodable)


def split(
    documents: list[Document], holdout_fraction: float
) -> tuple[list[Document], list[Document]]:
    """The training part and the held-out part; a ValueError where one of them is empty."""
    parts: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        parts[_unit_hash(document.name) < holdout_fraction].append(document)
    for part, name, remedy in zip(parts, ("training", "held-out"), ("lower", "raise"), strict=True):
        if not part:
            raise ValueError(
                f"data.holdout_fraction={holdout_fraction} leaves none of the {len(documents)} "
                f"documents for the {name} part; {remedy} it or add documents"
            )
    return parts


def _unit_hash(name: str) -> float:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _read(
    root: pathlib.Path, files: list[pathlib.Path], decode: Callable[[bytes], str]
) -> tuple[list[Document], list[str]]:
    documents, undecodable = [], []
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        try:
            documents.append(Document(name, decode(file.read_bytes())))
        except (UnicodeDecodeError, SyntaxError):  # the latter: an unknown encoding is declared
            undecodable.append(name)
    return documents, undecodable


def _library_files(root: pathlib.Path) -> list[pathlib.Path]:
    files = [
        file for file in root.rglob("*.py") if _SKIPPED.isdisjoint(file.relative_to(root).parts)
    ]
    if not files:
        raise ValueError(
            f"This Python has no library source in {root}; use data.source='text' and data.path"
        )
    return files


def _decode_python(source: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return source.decode(encoding)


def _matching_files(pattern: str) -> list[pathlib.Path]:
    matches = map(pathlib.Path, glob.iglob(pattern, recursive=True))
    files = [path for path in matches if path.is_file()]
    if not files:
        raise ValueError(
            f"data.path={pattern!r} matches no file; give a glob such as '/corpus/**/*.txt'"
        )
    return files


def _fixed_folder(pattern: str) -> pathlib.Path:
    """The leading folders without wildcards, to which names are relative."""
    folders = pathlib.Path(pattern).parts[:-1]
    return pathlib.Path(*itertools.takewhile(lambda part: glob.escape(part) == part, folders))
