"""Prepared data: a source's records as tokens, in ArrayRecord shards with a manifest.

The shards mirror the source record by record: the i-th record of one is the i-th of the other,
under the same name, and an unusable record is stored as the reason why. So training on prepared
data equals training on the source, bit for bit: the same split, the same order, the same skips.

A directory holds `manifest.json`, shards such as `shard-00000-of-00016.array_record`, and the
tokenizer. A record in them is a msgpack map of `name` and either `ids` (int32, little-endian: the
whole document, of which all but the last are read and all but the first predicted) and, where not
all are 1, `loss_weights` (float32, of what is predicted), or `error`.

ArrayRecord stores a checksum of every record, and the manifest the record count and size of each
shard, so a truncated, altered or swapped shard is detected when it is opened or read, and named.
"""

import hashlib
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from qwen3next_jax.command import replacing
from qwen3next_jax.config import read_json
from qwen3next_jax.data.files import (
    BadFileError,
    BadValueError,
    is_local,
    open_array_record,
    record_name,
    riegeli_errors,
    size_and_time,
)
from qwen3next_jax.data.tokenizer import Tokenizer, fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
_OPTIONS = "group_size:1,zstd:3"  # groups of 1, because records are read one at a time


class TokenizedDocument(dict):
    """tokens, targets, int32 [n], and loss_weights, float32 [n]."""


class PreparedFile:
    """The records that came from one file of the source; its name and length are that file's."""

    def __init__(self, name: str, *, first: int, count: int, one: bool, shards: "_Shards"):
        self.name, self.is_one_document = name, one
        self._first, self._count, self._shards = first, count, shards

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> TokenizedDocument:
        name = record_name(self, number)
        shard, content = self._shards[self._first + number]
        try:
            found = msgpack.unpackb(content)
            if found["name"] != name:
                raise BadValueError(f"{shard} holds {found['name']!r} in its place")
            if "error" in found:
                raise BadValueError(found["error"])
            ids = np.frombuffer(found["ids"], "<i4").astype(np.int32)
            weights = np.ones(len(ids) - 1, np.float32)
            if "loss_weights" in found:
                weights = np.frombuffer(found["loss_weights"], "<f4").astype(np.float32)
        except (msgpack.UnpackException, KeyError, TypeError) as error:
            raise BadValueError(f"{shard} is altered: {error!r}") from error
        return TokenizedDocument(tokens=ids[:-1], targets=ids[1:], loss_weights=weights)


def open_prepared(path: str) -> list[PreparedFile]:
    """The files of a source that was prepared, in its order.

    Args:
      path: the directory.

    Raises:
      BadFileError: it holds no finished preparation, or names each shard that is missing or of
        another size.
    """
    directory = epath.Path(path)
    manifest = read_manifest(directory)
    problems = []
    for shard in manifest["shards"]:
        file = directory / shard["file"]
        if not file.exists():
            problems.append(f"{file} is missing")
        elif (size := size_and_time(file)[0]) != shard["bytes"]:
            problems.append(f"{file} has {size} of {shard['bytes']} bytes")
    if problems:
        raise BadFileError(
            f"{directory} is damaged; prepare the data again in another directory:\n  "
            + "\n  ".join(problems)
        )
    shards = _Shards(directory, manifest["shards"])
    counts = [count for _, count, _ in manifest["files"]]
    return [
        PreparedFile(name, first=first, count=count, one=one, shards=shards)
        for (name, count, one), first in zip(
            manifest["files"], itertools.accumulate(counts, initial=0), strict=False
        )
    ]


def prepared_source(path: str) -> str:
    """The `data.source` that prepared data were made from."""
    return read_manifest(epath.Path(path))["source"]["source"]


def check_prepared(path: str, tokenizer: Tokenizer) -> None:
    """Refuses prepared data of another tokenizer, or chats of another template.

    Raises:
      ValueError: says how they differ.
    """
    manifest = read_manifest(epath.Path(path))
    now = {**fingerprint(tokenizer), "chat_template_sha256": chat_template_sha256(tokenizer)}
    for key, was in manifest["tokenizer"].items():
        if key == "chat_template_sha256" and not manifest["chats"]:
            continue
        if now[key] != was:
            raise ValueError(
                f"{path} was prepared with another tokenizer than {tokenizer.path}: {key} was "
                f"{was!r}, now {now[key]!r}; its own is in that directory: set data.tokenizer to it"
            )


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """Reads `manifest.json`; raises a BadFileError if it is missing or of another format."""
    file = directory / MANIFEST
    if not file.exists():
        raise BadFileError(
            f"{directory} holds no {MANIFEST}; expected a directory that python -m "
            "qwen3next_jax.data.prepare has finished. Started again, it goes on"
        )
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise BadFileError(f"{file} has format={manifest.get('format')!r}, expected {FORMAT}")
    return manifest


def chat_template_sha256(tokenizer: Tokenizer) -> str | None:
    """The hash of a tokenizer's chat template; None where it has none."""
    try:
        return hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    except (FileNotFoundError, ValueError):
        return None


def encode_document(name: str, document: Mapping[str, np.ndarray]) -> bytes:
    """A shard's record for a document."""
    tokens, targets, weights = (document[k] for k in ("tokens", "targets", "loss_weights"))
    ids = np.append(tokens, targets[-1:])
    fields = {"name": name, "ids": ids.astype("<i4").tobytes()}
    if not (weights == 1).all():
        fields["loss_weights"] = weights.astype("<f4").tobytes()
    return msgpack.packb(fields)


def encode_error(name: str, reason: str) -> bytes:
    """A shard's record in place of a record of the source that cannot be used."""
    # A reason may quote half of a surrogate pair, which UTF-8 cannot encode.
    return msgpack.packb({"name": name, "error": reason}, unicode_errors="backslashreplace")


def write_shard(path: epath.Path, records: Iterable[bytes]) -> tuple[int, str]:
    """Writes a shard, which appears whole or not at all.

    Args:
      path: the shard's path, local or in the cloud.
      records: the shard's records, in order.

    Returns:
      Its size in bytes and its SHA-256.
    """
    with tempfile.TemporaryDirectory() as folder, replacing(path) as partial:
        local = pathlib.Path(partial if is_local(path) else os.path.join(folder, path.name))
        writer = ArrayRecordWriter(os.fspath(local), _OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        with local.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = local.stat().st_size
        if not is_local(path):
            epath.Path(local).copy(partial)
    return size, digest


class _Shards:
    """All records of a directory's shards by number, each with its shard's path."""

    def __init__(self, directory: epath.Path, shards: Sequence[Mapping[str, Any]]):
        self._paths = [directory / shard["file"] for shard in shards]
        self._counts = [shard["records"] for shard in shards]
        self._ends = np.cumsum(self._counts)
        self._opened: dict[int, Any] = {}

    def __getitem__(self, index: int) -> tuple[epath.Path, bytes]:
        i = int(np.searchsorted(self._ends, index, side="right"))
        position = index - int(self._ends[i]) + self._counts[i]
        with riegeli_errors(f"{self._paths[i]} is truncated or altered"):
            if i not in self._opened:
                records = open_array_record(self._paths[i])
                if len(records) != self._counts[i]:
                    raise ValueError(f"holds {len(records)} records instead of {self._counts[i]}")
                self._opened[i] = records
            return self._paths[i], self._opened[i][position]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}
