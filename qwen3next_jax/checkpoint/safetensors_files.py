"""Safetensors files: checked before any tensor is read, and mapped to memory only while in use.

A file consists of the header's length (8 bytes, little-endian), the header in JSON, which gives
each tensor's dtype, shape and offsets, and the tensors. The format is read and written here,
because the `safetensors` package has no bfloat16 for numpy and writes only tensors that are in
memory as a whole. Each tensor is memory-mapped separately: the pages that are read or written count
as this process's memory until the mapping is dropped, and only touched pages are read.
"""

import collections
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
View = Callable[[np.ndarray], np.ndarray]  # such as a transposition, or a slice of one
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Stored(NamedTuple):
    """The location, dtype and shape of a tensor."""

    file: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class TensorFiles(Mapping[str, np.ndarray]):
    """Tensors in files, by name, each mapped into memory for as long as the caller keeps it."""

    def __init__(self, stored: Mapping[str, Stored], *, writable: bool = False):
        """Opens nothing yet."""
        self.stored, self._mode = dict(stored), "r+" if writable else "r"

    def __getitem__(self, name: str) -> np.ndarray:
        s = self.stored[name]
        mode: Any = self._mode
        return np.memmap(s.file, mode=mode, offset=s.offset, dtype=s.dtype, shape=s.shape)

    def take(self, name: str, view: View) -> np.ndarray:
        """A view of a tensor."""
        return view(self[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def sync(self) -> None:
        """Waits until all files are on disk."""
        for file in {s.file for s in self.stored.values()}:
            sync(file)


def read_directory(
    directory: pathlib.Path, dtypes: Mapping[str, np.dtype] = DTYPES
) -> tuple[TensorFiles, list[str], set[str]]:
    """Reads the headers of a checkpoint in one file or several.

    Args:
      directory: path of the checkpoint.
      dtypes: dtypes by the format's names; tensors of others are problems.

    Returns:
      The tensors; the problems of the files; the names of tensors that these problems made
      unavailable, which need not be reported again.
    """
    stored: dict[str, Stored] = {}
    problems: list[str] = []
    weight_map: dict[str, str] = {}
    if (directory / INDEX).exists():
        try:
            weight_map = dict(json.loads((directory / INDEX).read_text())["weight_map"])
            if strange := [k for k, v in weight_map.items() if not isinstance(v, str)]:
                raise ValueError(f"no file is named for {', '.join(strange)}")
        except (ValueError, KeyError, TypeError) as error:
            return TensorFiles({}), [f"unreadable index: {INDEX} ({error!r})"], set()
        files = sorted(set(weight_map.values()))
        others = {f.name for f in directory.glob("model*.safetensors")} - set(files)
        problems += [f"unexpected shard: {name} is not in {INDEX}" for name in sorted(others)]
    elif (directory / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        return TensorFiles({}), [f"missing: {INDEX} or model.safetensors"], set()

    lost = set()
    for name in files:
        found, complaints = _read_header(directory / name, dtypes)
        problems += complaints
        indexed = {tensor for tensor, file in weight_map.items() if file == name}
        for tensor in found.keys() & stored.keys():
            problems.append(f"twice: {tensor} is in {stored[tensor].file.name} and in {name}")
        if weight_map and found:
            absent = indexed - found.keys()
            problems += [f"missing: {t}, in {name} by {INDEX}" for t in sorted(absent)]
            lost |= absent
        if complaints:
            lost |= indexed - found.keys()
        stored |= found
    return TensorFiles(stored), problems, lost


def create(
    directory: pathlib.Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    max_shard_size: int | str,
) -> TensorFiles:
    """Creates the files of a checkpoint in their full size; the caller then fills in the tensors.

    Args:
      directory: path of an existing directory.
      tensors: dtypes and shapes by name, in the order in which they are assigned to files.
      max_shard_size: most bytes in a file, as a number or such as "5GB"; a larger tensor gets a
        file of its own.

    Raises:
      OSError: the disk has no room for them.
    """
    limit = parse_size(max_shard_size)
    shards: list[dict[str, int]] = [{}]  # per file, the sizes of its tensors in bytes
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size

    stored: dict[str, Stored] = {}
    for i, shard in enumerate(shards, start=1):
        file = directory / f"model-{i:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file = directory / "model.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # The larger dtypes first, so that each tensor is aligned.
        for name in sorted(shard, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name]
            start, end = end, end + shard[name]
            place = {"shape": list(shape), "data_offsets": [start, end]}
            header[name] = {"dtype": _NAMES[dtype], **place}
            stored[name] = Stored(file, start, dtype, shape)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        origin = 8 + len(text)
        for name in shard:
            stored[name] = stored[name]._replace(offset=origin + stored[name].offset)
        with file.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.flush()
            if hasattr(os, "posix_fallocate"):  # a full disk fails here
                os.posix_fallocate(opened.fileno(), 0, origin + end)
            else:  # macOS and Windows: a full disk fails when the pages are written
                opened.truncate(origin + end)
    if len(shards) > 1:
        total = sum(size for shard in shards for size in shard.values())
        weight_map = {name: stored[name].file.name for name in sorted(stored)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return TensorFiles(stored, writable=True)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB", "1GiB" or a number.

    Raises:
      ValueError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    found = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if found < 1:
        raise ValueError(f"max_shard_size={size!r} is no size; give one such as '5GB' or '500MB'")
    return found


def sync(path: pathlib.Path) -> None:
    """Returns when a file or a directory's list of files is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_header(
    file: pathlib.Path, dtypes: Mapping[str, np.dtype]
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a file that can be read, and what is wrong with it."""
    name = file.name
    if not file.is_file():
        return {}, [f"missing shard: {name}"]
    size = file.stat().st_size
    with file.open("rb") as opened:
        origin = 8 + int.from_bytes(opened.read(8), "little")
        if size < 8 or origin > size:
            return {}, [f"truncated shard: {name} ends within its header, at {size} bytes"]
        try:
            header = dict(json.loads(opened.read(origin - 8)))
            header.pop("__metadata__", None)
            places = {
                tensor: (x["dtype"], tuple(map(int, x["shape"])), *map(int, x["data_offsets"]))
                for tensor, x in header.items()
            }
        except (ValueError, KeyError, TypeError) as error:
            return {}, [f"unreadable shard: the header of {name} is damaged ({error!r})"]

    problems, others = [], collections.Counter[str]()
    end = origin + max((stop for *_, stop in places.values()), default=0)
    if end > size:
        problems.append(f"truncated shard: {name} has {size} of {end} bytes")
    elif end < size:
        problems.append(f"unreadable shard: {name} has {size - end} bytes that no tensor owns")
    # Tensors with problems are included too, so that they are not also reported as missing.
    stored = {}
    for tensor, (code, shape, start, stop) in places.items():
        dtype = dtypes.get(code)
        stored[tensor] = Stored(file, origin + start, dtype or np.dtype(np.uint8), shape)
        if dtype is None:
            others[code] += 1
            if others[code] == 1:  # a quantized checkpoint has thousands of them
                problems.append(
                    f"unsupported dtype: {tensor} is {code}, expected {' or '.join(dtypes)}"
                )
        elif start < 0 or stop - start != int(np.prod(shape)) * dtype.itemsize:
            problems.append(
                f"unreadable tensor: {tensor} {list(shape)} of {code} in {stop - start} bytes"
            )
    problems += [
        f"unsupported dtype: {count - 1} more tensors of {name} are {code}"
        for code, count in others.items()
        if count > 1
    ]
    return stored, problems
