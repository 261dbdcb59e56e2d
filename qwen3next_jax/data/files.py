"""Files as sequences of raw values, by number: a text, or the object of a JSON line or table row.

Random access needs to know where a record begins. A plain JSONL file is scanned once for its line
ends (8 bytes a line are kept), and ArrayRecord has an index. Compressed JSONL, Parquet and files in
the cloud have no index by which to read a single record, so they are unpacked once, as plain JSONL,
into `$XDG_CACHE_HOME/qwen3next_jax/unpacked` (`~/.cache` where that is not set); the
disk must hold them. Corpora too large for that are for `data/prepare.py`.

A bad file raises BadFileError and a bad value BadValueError. Their messages do not name the file;
the caller adds its name.
"""

import codecs
import contextlib
import errno
import functools
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import tokenize
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, runtime_checkable

import grain
import numpy as np
from absl import logging
from etils import epath

from qwen3next_jax.command import cache_folder, replacing
from qwen3next_jax.data.hashing import mix64

_SCANNED = 1 << 24  # bytes read at a time


# Optional fields of an object that are read along with the messages of a chat.
BESIDE_MESSAGES = ("tools", "chat_template_kwargs")


class BadFileError(ValueError):
    """A file that cannot be read."""


class BadValueError(ValueError):
    """A value that cannot be read."""


@runtime_checkable
class RecordFile(Protocol):
    """The records of one file of a source.

    Attributes:
      name: relative to the source.
      is_one_document: whether the file is a single record, named by the file alone.
    """

    name: str
    is_one_document: bool

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...


def record_name(file: RecordFile, number: int) -> str:
    """The name of a file's record: its place from 1, as in `a.jsonl:17`, or the file alone."""
    return file.name if file.is_one_document else f"{file.name}:{number + 1}"


class TextFile:
    """A UTF-8 file that is one document; line ends and tabs are kept."""

    is_one_document = True

    def __init__(self, name: str, path: epath.Path):
        self.name, self._path = name, path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> str:
        return decode_utf8(self._path.read_bytes().removeprefix(codecs.BOM_UTF8))


class PythonFile(TextFile):
    """Python source, in the encoding that it declares."""

    def __getitem__(self, number: int) -> str:
        source = self._path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
            return source.decode(encoding)
        except (UnicodeDecodeError, SyntaxError) as error:  # the latter: an unknown encoding
            raise BadValueError(f"cannot be decoded: {error}") from error


class JsonLinesFile:
    """An object a line; `path` is local and plain."""

    is_one_document = False

    def __init__(self, name: str, path: str | os.PathLike):
        self.name, self._path = name, os.fspath(path)
        self._ends = _line_ends(self._path)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Any:
        start = int(self._ends[number - 1]) if number else 0
        with open(self._path, "rb") as file:
            file.seek(start)
            line = file.read(int(self._ends[number]) - start)
        if not number:
            line = line.removeprefix(codecs.BOM_UTF8)
        return _parse_json(decode_utf8(line))


def open_text(name: str, path: epath.Path) -> TextFile:
    """A text file, whose name is not that of a compressed or a Parquet file."""
    _refuse_parquet(path)
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst", ".zstd", ".bz2", ".xz", ".zip"):
        raise BadFileError(
            f"is compressed ({suffix}) by its name, and is not read as text; unpack it"
        )
    return TextFile(name, path)


def _refuse_parquet(path: epath.Path) -> None:
    if path.suffix.lower() == ".parquet":
        raise BadFileError("is a Parquet file by its name; set data.source='parquet'")


def open_json_lines(name: str, path: epath.Path) -> JsonLinesFile:
    """A JSONL file, plain or compressed (`.gz`, `.zst`), local or not."""
    _refuse_parquet(path)
    suffix = path.suffix.lower()
    if suffix in (".bz2", ".xz", ".zip"):
        raise BadFileError(f"is compressed as {suffix}, which is not read; pack it as .gz or .zst")
    if suffix in (".gz", ".zst", ".zstd") and not size_and_time(path)[0]:
        raise BadFileError("is empty; compressed, even an empty file has some bytes")
    if suffix == ".gz":

        def unpack(target: BinaryIO) -> None:
            try:
                with path.open("rb") as file, gzip.open(file) as content:
                    shutil.copyfileobj(content, target, _SCANNED)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise BadFileError(f"is truncated or no gzip: {error}") from error
    elif suffix in (".zst", ".zstd"):
        zstandard = import_extra("zstandard")

        def unpack(target: BinaryIO) -> None:
            with path.open("rb") as file:
                _unpack_zstd(zstandard, file, target)
    else:
        return JsonLinesFile(name, _local(path))

    return JsonLinesFile(name, _unpacked(path, unpack))


def open_parquet(name: str, path: epath.Path, *, field: str) -> JsonLinesFile:
    """A Parquet file's rows as objects of `field` and, where they exist, `BESIDE_MESSAGES`."""
    arrow = import_extra("pyarrow")
    parquet = import_extra("pyarrow.parquet")

    def unpack(target: BinaryIO) -> None:
        try:
            with path.open("rb") as file:
                table = parquet.ParquetFile(file)
                names = table.schema_arrow.names
                if field not in names:
                    raise BadFileError(f"has no column {field!r}; its columns are {sorted(names)}")
                columns = [field, *(c for c in BESIDE_MESSAGES if c in names and c != field)]
                for batch in table.iter_batches(batch_size=1024, columns=columns):
                    for row in range(batch.num_rows):
                        target.write(_json_line(batch, row) + b"\n")
        except (arrow.ArrowException, OSError) as error:
            raise BadFileError(f"is truncated or no Parquet: {error}") from error

    # 4 is the version of the unpacked format: absent keys are left out, each row is a line.
    return JsonLinesFile(name, _unpacked(path, unpack, extra=f"{field}\x004"))


class ArrayRecordFile:
    """UTF-8 texts, or JSON objects where `as_json`."""

    is_one_document = False

    def __init__(self, name: str, path: epath.Path, *, as_json: bool):
        self.name, self._as_json = name, as_json
        self._records = open_array_record(path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Any:
        with riegeli_errors("cannot be read"):
            content = self._records[number]
        text = decode_utf8(content)
        hint = "; data.field='' reads records as they are"
        return _parse_json(text, hint) if self._as_json else text


def open_array_record(path: epath.Path) -> grain.sources.ArrayRecordDataSource:
    """The records of one file as bytes; it stays open."""
    _allow_many_open_files()
    path = _local(path)
    with riegeli_errors("is truncated or no ArrayRecord", as_error=BadFileError):
        return grain.sources.ArrayRecordDataSource([os.fspath(path)])


@contextlib.contextmanager
def riegeli_errors(
    what: str, *, as_error: type[BadFileError | BadValueError] = BadValueError
) -> Iterator[None]:
    """Turns errors of ArrayRecord's library (Riegeli) into ours.

    "Too many open files" is not this file's fault; it becomes an OSError.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, as_error):
            raise
        if "Too many open files" in str(error):
            raise OSError(
                errno.EMFILE,
                f"too many files are open ({error}); each file of ArrayRecord stays open: raise "
                "the limit, as by `ulimit -n 65536`",
            ) from error
        raise as_error(f"{what}: {error}") from error


@functools.cache
def _allow_many_open_files() -> None:
    """Raises the process's own limit, often 1024, as far as it may."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not everywhere, not for everyone
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class TfdsSplit:
    """A split of a dataset in ArrayRecord or Parquet files, read without TensorFlow.

    Args:
      path: the dataset's name ("python_standard_library", "wiki40b/en:1.3.0"), which is then looked
        for in TFDS's data directory and made where it is not there; or the directory of a version.
      split: "train", or with TFDS's slices, "train[:90%]".
    """

    is_one_document = False

    def __init__(self, path: str, split: str):
        tfds = import_extra("tensorflow_datasets")
        # Importing the module makes our own dataset known to TFDS by its name.
        import qwen3next_jax.data.python_standard_library  # noqa: F401

        try:
            if (epath.Path(path) / "dataset_info.json").exists():
                builder = tfds.builder_from_directory(path)
                self._rows = builder.as_data_source(split=split)
            else:
                self._rows = tfds.data_source(path, split=split)
        except Exception as error:
            raise BadFileError(
                f"data.path={path!r}, data.split={split!r} cannot be opened as a dataset of TFDS: "
                f"{error}"
            ) from error
        self.folder = os.fspath(self._rows.dataset_info.data_dir)
        # The name holds the dataset and not its folder, so that a copy has the same records held
        # out, and no slice from the beginning, so that it has those of the whole split.
        from_start = re.fullmatch(r"(\w+)\[:[^\]]*\]", split)
        self.name = f"{self._rows.dataset_info.full_name}/{from_start[1] if from_start else split}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        with riegeli_errors("cannot be read"):
            return self._rows[number]


class SyntheticFile:
    """A hundred thousand documents of made-up words: frequencies by Zipf's law, log-normal lengths.

    A document is a function of its number.
    """

    is_one_document = False
    name = "synthetic"
    _LENGTH, _WORDS = 100_000, 8192

    def __len__(self) -> int:
        return self._LENGTH

    def __getitem__(self, number: int) -> str:
        rng = np.random.default_rng(number)
        words = max(1, int(rng.lognormal(mean=5, sigma=1)))
        ranks = np.exp(rng.random(words) * np.log(self._WORDS)).astype(np.uint64)
        return " ".join(map(_word, mix64(ranks).tolist())) + ".\n"


def _word(bits: int) -> str:
    """Two to four syllables."""
    syllables = []
    for _ in range(2 + bits % 3):
        bits //= 3
        syllables.append("bdfgklmnprstvz"[bits % 14] + "aeiou"[bits // 14 % 5])
        bits //= 70
    return "".join(syllables)


def decode_utf8(content: bytes) -> str:
    """Decodes UTF-8; a BadValueError says which byte is invalid."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadValueError(
            f"is no UTF-8: byte 0x{content[error.start]:02x} at {error.start}"
        ) from error


def _parse_json(text: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: brackets nested a thousand deep
        empty = "" if text.strip() else ", the line is empty"
        raise BadValueError(f"is no JSON: {error}{hint}{empty}") from error


def import_extra(module: str, *, extra: str = "data") -> Any:
    """Imports a module that only installations with this extra have."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed for this and cannot be imported ({error}); install it by "
            f"pip install 'qwen3next_jax[{extra}]'"
        ) from error


def _line_ends(path: str) -> np.ndarray:
    """Where each line ends, the newline included; int64 [lines]."""
    ends, start = [], 0
    with open(path, "rb") as file:
        while chunk := file.read(_SCANNED):
            newlines = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            ends.append(newlines + (start + 1))
            start += len(chunk)
            last = chunk[-1:]
    if start and last != b"\n":
        ends.append(np.array([start]))
    return np.concatenate(ends).astype(np.int64) if ends else np.zeros(0, np.int64)


def _unpack_zstd(zstandard: Any, file: BinaryIO, target: BinaryIO) -> None:
    """Unpacks frame by frame: only a frame's own decompressor knows whether it has ended."""
    new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    frame = None
    try:
        while chunk := file.read(_SCANNED):
            while chunk:
                frame = frame or new()
                target.write(frame.decompress(chunk))
                chunk = b""
                if frame.eof:
                    chunk, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise BadFileError(f"is no zstd: {error}") from error
    if frame is not None:
        raise BadFileError("is a truncated zstd file")


def _json_line(batch: Any, row: int) -> bytes:
    try:
        values = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
        values = {k: _given(v) for k, v in values.items()}
    except UnicodeDecodeError as error:
        # Stays one line of invalid UTF-8: the record is reported when it is read.
        return error.object.replace(b"\n", b" ")
    return json.dumps(values, ensure_ascii=False, default=str).encode()


def _given(value: Any) -> Any:
    """Decodes bytes, and removes the None that Arrow fills in for keys that only other rows have.

    A message's `content` stays, because None is a valid value there.
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        stays = "content" if "role" in value else None
        return {k: _given(v) for k, v in value.items() if v is not None or k == stays}
    return [_given(v) for v in value] if isinstance(value, list) else value


def _local(path: epath.Path) -> epath.Path:
    """The file itself if it is local, else its copy."""
    if is_local(path):
        return path

    def copy(target: BinaryIO) -> None:
        with path.open("rb") as file:
            shutil.copyfileobj(file, target, _SCANNED)

    return epath.Path(_unpacked(path, copy))


def _unpacked(
    path: epath.Path, unpack: Callable[[BinaryIO], None], extra: str = ""
) -> pathlib.Path:
    """The unpacked copy of a file, made unless one exists for its current size and mtime.

    The copy appears whole or not at all.
    """
    size, changed = size_and_time(path)
    where = os.path.abspath(path) if is_local(path) else os.fspath(path)
    identity = f"{where}\0{size}\0{changed}\0{extra}"
    folder = cache_folder() / "unpacked"
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    copy = folder / f"{digest}-{path.name[-32:]}"  # a name has 255 bytes at most
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        logging.info("Unpacking %s to %s", path, copy)
        with replacing(copy) as partial, partial.open("wb") as target:
            unpack(target)
    return copy


def size_and_time(path: epath.Path) -> tuple[int, float]:
    """A file's size in bytes and its modification time in seconds since 1970."""
    if is_local(path):
        stat = os.stat(path)  # epath's stat looks up the owner's name, which may not exist
        return stat.st_size, stat.st_mtime
    remote = path.stat()
    return remote.length, float(remote.mtime)


def is_local(path: epath.Path) -> bool:
    """Whether the path is on a mounted file system, so that other libraries can open it."""
    return "://" not in os.fspath(path)
