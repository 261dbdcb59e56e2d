"""Records of text by number, whatever holds them: files of text, JSONL, Parquet, ArrayRecord, TFDS.

`open_source` gives a `Source` of `Record`s by number. It is files one after another, and a file
(`data/files.py`) is a sequence of raw values: a text, or an object one of whose fields holds the
text or the messages of a chat. A record is read when it is asked for; nothing but its place is kept
in memory. Sources can be pickled and used by several threads at a time.

A record is named by its file, relative to the folders of the glob that have no wildcard, and by its
number from 1: `wiki/a.jsonl:17`. The name stands in errors, and it decides whether the record is
held out (`data/holdout.py`).
"""

import argparse
import dataclasses
import errno
import functools
import json
import pathlib
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from etils import epath

from qwen3next_jax.config import SOURCES
from qwen3next_jax.data import files
from qwen3next_jax.data.files import BadFileError, RecordFile
from qwen3next_jax.data.globs import fixed_folder, matching_files
from qwen3next_jax.data.prepared import TokenizedDocument, open_prepared
from qwen3next_jax.data.tokenizer import check_text

# Folders of the standard library that are not part of it, or whose odd files test Python itself.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_LOGGED = 5  # how many skipped files are logged


class BadRecordError(ValueError):
    """A record that cannot be used; the message names it and says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One document as text, messages or tokens; the other two are None.

    Attributes:
      name: file and number, such as `a.jsonl:17`; the file alone where it is one document.
      text: the document's text.
      messages: a chat's messages, as its template expects them.
      tools: JSON schemas of the functions that the chat may call, or None.
      chat_template_kwargs: further variables of the chat's template, or None.
      tokens: a tokenised document, as `data/documents.py` describes it.
    """

    name: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tokens: Mapping[str, np.ndarray] | None = None


@runtime_checkable
class Records(Protocol):
    """Records by number: a source, a part of one, or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


class Chained:
    """The elements of several `sequences`, one after another."""

    def __init__(self, sequences: Sequence[Any]):
        self.sequences = sequences
        self._ends = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Any:
        sequence, number = self.place(index)
        return sequence[number]

    def place(self, index: int) -> tuple[Any, int]:
        """The sequence that holds an element, and the element's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)}")
        i = int(np.searchsorted(self._ends, index, side="right"))
        return self.sequences[i], index - int(self._ends[i]) + len(self.sequences[i])


class Source:
    """The records of files, one after another.

    Attributes:
      files: the files that could be opened, sorted by name.
      skipped_files: names of the files that could not be opened, where errors are skipped.

    Indexing raises a BadRecordError for a record that cannot be used.
    """

    def __init__(
        self,
        record_files: Sequence[RecordFile],
        *,
        field: str = "",
        skipped_files: Sequence[str] = (),
    ):
        self.files = record_files
        self.skipped_files = tuple(skipped_files)
        self._field = field
        self._values = Chained(record_files)

    def __len__(self) -> int:
        return len(self._values)

    def name(self, index: int) -> str:
        """The name of a record, good or bad."""
        return files.record_name(*self._values.place(index))

    def __getitem__(self, index: int) -> Record:
        file, number = self._values.place(index)
        name = self.name(index)
        try:
            return _record(name, file[number], self._field)
        except (files.BadValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the process is out of file descriptors; the record may be good
            raise BadRecordError(f"{name}: {error}") from error


def open_source(
    source: str, path: str, *, field: str = "text", split: str = "train", on_error: str = "raise"
) -> Source:
    """Opens a source by the values of a config's `data` section.

    Args:
      source: one of `config.SOURCES`:
        "text": UTF-8 files, each a document;
        "jsonl": an object a line, plain or compressed (.gz, .zst);
        "parquet": an object a row;
        "array_record": a UTF-8 text or an object a record;
        "tfds": a dataset of TensorFlow Datasets;
        "prepared": the output of `data/prepare.py`;
        "stdlib": the .py files of the running Python's standard library;
        "synthetic": made-up words.
      path: a glob in which `**` stands for any folders, a cloud path too; for "tfds" the dataset's
        name, or the directory that holds it; "" for "stdlib" and "synthetic".
      field: of objects, the one that holds the text or the messages; for "array_record", ""
        says that a record is a text.
      split: for "tfds".
      on_error: "raise", or "skip": files and folders that cannot be read are logged and counted in
        `skipped_files`.

    Raises:
      ValueError: the source is unknown or takes no path, nothing matches, or (BadFileError) a file
        cannot be read.
    """
    if path and SOURCES.get(source) == "":
        raise ValueError(f"The source {source!r} takes no path; leave out {path!r}")
    if source == "synthetic":
        return Source([files.SyntheticFile()])
    if source == "prepared":
        return Source(open_prepared(path))
    if source == "tfds":
        return Source([files.TfdsSplit(path, split)], field=field)
    openers: dict[str, Callable[[str, epath.Path], RecordFile]] = {
        "text": files.open_text,
        "stdlib": files.PythonFile,
        "jsonl": files.open_json_lines,
        "parquet": functools.partial(files.open_parquet, field=field),
        "array_record": functools.partial(files.ArrayRecordFile, as_json=bool(field)),
    }
    if source not in openers:
        raise ValueError(f"data.source={source!r} is unknown; expected one of {', '.join(SOURCES)}")
    problems: list[str] = []
    if source == "stdlib":
        root = epath.Path(sysconfig.get_paths()["stdlib"])
        found = _library_files(root)
    else:
        root, found = fixed_folder(path), matching_files(path, problems)

    opened = []
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in found):
        try:
            check_text(name)  # Python decodes invalid bytes of a name to lone surrogates
        except ValueError:
            problems.append(f"{name!r}: its name is no UTF-8; rename it")
            continue
        try:
            opened.append(openers[source](name, file))
        except (BadFileError, OSError) as error:
            problems.append(f"{file}: {error}")
    if problems and on_error != "skip":
        raise BadFileError(
            f"data.source={source!r} has files that cannot be read; repair them, or set "
            "data.on_error='skip' to go without them:\n  " + "\n  ".join(problems[:_LOGGED])
        )
    for problem in problems[:_LOGGED]:
        logging.warning("Skipped %s", problem)
    if problems:
        logging.warning("Skipped %d files or folders that cannot be read", len(problems))
    if not sum(map(len, opened)):
        raise ValueError(
            f"The {len(opened)} files of data.source={source!r}, data.path={path!r} hold no record"
        )
    return Source(opened, field=field, skipped_files=problems)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `open_source` to a command that reads anything but prepared data."""
    sources = [source for source in SOURCES if source != "prepared"]
    parser.add_argument("--source", required=True, choices=sources)
    parser.add_argument("--path", default="", help="as data.path: a glob of files, or a dataset")
    parser.add_argument("--field", default="text", help="of objects, the one with text or messages")
    parser.add_argument("--split", default="train", help="of TensorFlow Datasets")
    parser.add_argument("--on_error", default="raise", choices=("raise", "skip"))


def _record(name: str, value: Any, field: str) -> Record:
    """A value of a file as a record."""
    if isinstance(value, str):
        return Record(name=name, text=value)
    if isinstance(value, TokenizedDocument):
        return Record(name=name, tokens=value)
    if not isinstance(value, Mapping):
        raise files.BadValueError(f"expected an object with a field {field!r}, found {value!r:.80}")
    if field not in value:
        raise files.BadValueError(f"has no field {field!r}; its fields are {sorted(value)}")
    content = value[field]
    if isinstance(content, bytes):
        content = files.decode_utf8(content)
    chats = field == "messages"  # of which a text would be a mistake
    is_text = isinstance(content, str) and not chats
    if is_text and (field == "text" or not _is_chat_as_text(content)):
        return Record(name=name, text=content)
    if isinstance(content, list) and all(isinstance(message, Mapping) for message in content):
        beside = {key: value.get(key) for key in files.BESIDE_MESSAGES}
        return Record(name=name, messages=content, **beside)
    raise files.BadValueError(
        f"field {field!r} is {content!r:.80}; expected "
        + ("a list of messages" if chats else "a string, or a list of messages")
    )


def _is_chat_as_text(text: str) -> bool:
    """Whether this is JSON for the messages of a chat."""
    if not text.lstrip().startswith("["):
        return False
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(found) and all(isinstance(item, dict) and "role" in item for item in found)


def _library_files(root: epath.Path) -> list[epath.Path]:
    found = [
        epath.Path(file)
        for file in pathlib.Path(root).rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(file.relative_to(root).parts)
        and file.stat().st_size  # an empty `__init__.py` is no document
    ]
    if not found:
        raise ValueError(
            f"This Python has no library source in {root}; use data.source='text' and data.path"
        )
    return found
