"""Reads and writes Hugging Face directories.

`tensor_table.py` maps their tensors to our parameters. Before any tensor is read, a directory is
checked against that table, so that a missing shard, a truncated one, an extra tensor and a wrong
shape are reported in one error and not in four attempts. A new directory is written under another
name and renamed when complete.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwen3next_jax.checkpoint import fp8, safetensors_files
from qwen3next_jax.checkpoint.parameters import (
    build_model,
    final_dtype,
    parameter_shapes,
    shape_mismatches,
)
from qwen3next_jax.checkpoint.tensor_table import FileLayout, Take, TensorTable
from qwen3next_jax.command import partial_path
from qwen3next_jax.config import ModelConfig, fp8_block, read_json
from qwen3next_jax.data.chat import ADDITIONAL_TEMPLATES
from qwen3next_jax.data.tokenizer import TOKENIZER_FILES
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.parallel.mesh import read_array
from qwen3next_jax.parallel.names import map_leaves, named_leaves

EXPERT_LAYOUTS = {"per_expert": (), "fused": ("model", "mtp")}
_ARCHITECTURES = {"qwen3_next": "Qwen3NextForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_EMBED = "embed_tokens"
_MOST_LINES = 100  # of a report, about one kind of fault; there may be 150,000 tensors


class HFCheckpoint(NamedTuple):
    """A directory whose config and tensor headers passed all checks."""

    config: ModelConfig
    layout: FileLayout
    table: TensorTable
    tensors: fp8.WeightFiles
    dtypes: dict[str, np.dtype]  # dtypes that our parameters get, by path


def load_hf(
    directory: str | os.PathLike[str],
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    rope_scaling: Mapping[str, Any] | None = None,
    unstacked: bool = False,
) -> Qwen3Next:
    """Loads a Hugging Face checkpoint, one file or sharded, experts one by one or fused.

    Args:
      directory: path of a directory with config.json and safetensors.
      dtype: dtype of parameters and activations, float32 or bfloat16; `A_log` and `dt_bias` stay
        as stored. None: parameters as stored, those in FP8 as bfloat16, and activations in the
        embedding's dtype.
      mesh: mesh over which `parallel/mesh.py` shards the parameters; each process then reads only
        its devices' shards. None: one device.
      rope_scaling: replacement for the config's; {} disables YaRN.
      unstacked: see `load_checkpoint`.

    Returns:
      The model, with an MTP module if the files hold one; its `source` is the directory.

    Raises:
      ValueError: names all that is wrong with the directory.
    """
    path = pathlib.Path(directory)
    hf = open_hf(path, dtype)
    config = hf.config
    if rope_scaling is not None:
        config = dataclasses.replace(config, rope_scaling=rope_scaling)

    def value(name: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
        return read_parameter(hf, name, sharding, hf.dtypes[name])

    computed_in = hf.dtypes[_EMBED]
    model = build_model(config, value, dtype=computed_in, mesh=mesh, unstacked=unstacked)
    model.source = str(path.absolute())
    return model


def save_hf(
    model: Qwen3Next,
    directory: str | os.PathLike[str],
    dtype: Any = None,
    expert_layout: str = "per_expert",
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a Hugging Face checkpoint, MTP included.

    Args:
      model: the model, all of it on this process's devices.
      directory: path of a new or empty directory.
      dtype: dtype of the tensors; `A_log` and `dt_bias` stay as they are. None: the parameters'.
      expert_layout: "per_expert", one tensor for each projection of each expert, or "fused".
      max_shard_size: most bytes in a file, as a number or such as "5GB".

    Raises:
      FileExistsError: the directory holds something.
      ValueError: an argument is unknown, Hugging Face has no such model, or it is unstacked.
    """
    if model.is_unstacked:
        raise ValueError("An unstacked model cannot be saved; load or build it without `unstacked`")
    arrays = dict(named_leaves(nnx.state(model, nnx.Param)))
    away = [path for path, x in arrays.items() if not x.is_fully_addressable]
    if away:
        raise ValueError(
            f"{away[0]} is split over several processes; save a checkpoint and convert it with "
            "python -m qwen3next_jax.convert to-hf"
        )

    def blocks(path: str) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        for shard in arrays[path].addressable_shards:
            if shard.replica_id == 0:
                yield shard.index, np.asarray(shard.data)

    write_hf(
        pathlib.Path(directory),
        model.config,
        {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()},
        blocks,
        dtype=dtype,
        layout=FileLayout(fused=expert_layouts(expert_layout)),
        max_shard_size=max_shard_size,
        companions=None if model.source is None else pathlib.Path(model.source),
    )


def load_tensors(model: Qwen3Next, tensors: Mapping[str, Any]) -> None:
    """Fills a model's parameters, which keep their dtypes and shardings.

    Args:
      model: a model of the same config as the tensors.
      tensors: tensors by name in a Hugging Face checkpoint; experts one by one or fused.

    Raises:
      ValueError: names every missing, unexpected and misshapen tensor, or parameter that is not of
        the config; the model is unchanged.
    """
    params = nnx.state(model, nnx.Param)
    layout = FileLayout.of(tensors, model.config)
    table = checked_table(model.config, layout, dict(named_leaves(params)))
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}

    def take(name: str, view: safetensors_files.View) -> np.ndarray:
        return view(arrays[name])

    problems = shape_mismatches(table.shapes, {name: x.shape for name, x in arrays.items()})
    if not problems:
        problems = _head_mismatch(take, layout, table)
    if problems:
        raise ValueError("The tensors do not fit the config:\n  " + "\n  ".join(problems))

    def read(path: str, param: Any) -> jax.Array:
        whole = (slice(None),) * len(param.shape)
        return jax.device_put(table.read(take, path, whole, param.dtype), param.sharding)

    nnx.update(model, map_leaves(read, params))


def open_hf(directory: pathlib.Path, dtype: Any = None, new: Collection[str] = ()) -> HFCheckpoint:
    """Checks a directory and maps its tensors to our parameters; reads headers only.

    Args:
      directory: path of a directory with config.json and safetensors.
      dtype: dtype of the parameters except `A_log` and `dt_bias`; None: as stored, and bfloat16
        for FP8.
      new: paths of parameters that are not to be read, of which there may be no tensor.

    Raises:
      ValueError: names all that is wrong with it.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; expected a Hugging Face checkpoint")
    try:
        block = fp8_block(read_json(directory / "config.json"))
    except (ValueError, OSError):
        block = None  # `_described` says why
    tensors, problems, lost = fp8.read_directory(directory, block)
    stored = tensors.stored
    try:
        config = _described(directory, [*stored, *lost])
    except (ValueError, OSError) as error:
        raise _refused(directory, [f"config.json: {error}", *problems]) from None
    layout = FileLayout.of([*stored, *lost], config)
    table = checked_table(config, layout, new=new)
    if stored or not problems:
        problems += tensors.mismatches(table.shapes, lost)
    dtypes = {}
    for path in table.parameters:
        found = {stored[name].dtype for name in table.tensors_of(path) if name in stored}
        found &= fp8.READ_AS.keys()
        read_as = {fp8.READ_AS[d] for d in found}
        dtypes[path] = final_dtype(path, next(iter(read_as), np.dtype(np.float32)), dtype)
        if len(read_as) > 1 and final_dtype(path, None, dtype) is None:  # none was requested
            names = table.tensors_of(path)
            problems.append(
                f"mixed dtypes: {names[0]} to {names[-1]}, one parameter of ours, are "
                + " and ".join(sorted(d.name for d in found))
            )
    if not problems:
        problems += _head_mismatch(tensors.take, layout, table)
    if problems:
        raise _refused(directory, problems)
    return HFCheckpoint(config, layout, table, tensors, dtypes)


def describe_hf(directory: pathlib.Path) -> ModelConfig:
    """The config of a directory's model, read from config.json and the tensors' names alone."""
    tensors, _, lost = safetensors_files.read_directory(directory)
    return _described(directory, [*tensors.stored, *lost])


def _described(directory: pathlib.Path, names: Collection[str]) -> ModelConfig:
    config = ModelConfig.from_hf(directory)
    return dataclasses.replace(config, mtp_steps=int(any(n.startswith("mtp.") for n in names)))


def read_parameter(
    hf: HFCheckpoint, path: str, sharding: jax.sharding.Sharding | None, dtype: Any
) -> jax.Array:
    """Reads one of our parameters; each process reads only its devices' shards."""

    def read(block: tuple[slice, ...]) -> np.ndarray:
        return hf.table.read(hf.tensors.take, path, block, np.dtype(dtype))

    return read_array(hf.table.parameters[path], sharding, read)


def write_hf(
    directory: pathlib.Path,
    config: ModelConfig,
    parameters: Mapping[str, jax.ShapeDtypeStruct],
    blocks: Callable[[str], Iterable[tuple[tuple[slice, ...], np.ndarray]]],
    *,
    dtype: Any,
    layout: FileLayout,
    max_shard_size: int | str,
    companions: pathlib.Path | None,
) -> None:
    """Writes a directory from blocks of parameters, in memory one at a time.

    Args:
      directory: path of a new or empty directory.
      config: the model's config.
      parameters: shapes and dtypes of the parameters by path.
      blocks: function from a path to (index, values) of blocks that cover the parameter.
      dtype: dtype of the tensors except `A_log` and `dt_bias`; None: the parameters'.
      layout: how the files store experts and the output head.
      max_shard_size: most bytes in a file.
      companions: a directory to copy tokenizer files from, where it has any.

    Raises:
      FileExistsError: the directory holds something.
      ValueError: Hugging Face has no such model.
      OSError: the disk is full.
    """
    dtypes = {path: final_dtype(path, x.dtype, dtype) for path, x in parameters.items()}
    table = checked_table(config, layout, parameters)
    described = hf_config(config, dtypes[_EMBED])
    tensor_dtypes: dict[str, Any] = {}
    for path in sorted(dtypes, key=lambda path: dtypes[path].itemsize):
        # Of several parameters in one tensor the widest decides, so that none is rounded.
        tensor_dtypes.update(dict.fromkeys(table.tensors_of(path), dtypes[path]))
    supported = set(safetensors_files.DTYPES.values())
    if bad := sorted(set(tensor_dtypes.values()) - supported, key=str):
        raise ValueError(
            f"dtype={bad[0].name!r} is not supported; expected 'float32' or 'bfloat16'"
        )
    safetensors_files.parse_size(max_shard_size)  # refuses a bad size before anything is written
    with replacing_directory(directory) as beside:
        tensors = safetensors_files.create(
            beside,
            {name: (tensor_dtypes[name], shape) for name, shape in table.shapes.items()},
            max_shard_size,
        )
        for path in parameters:
            for block, values in blocks(path):
                table.write(tensors, path, block, values)
                del values  # before the next one is made
        tensors.sync()
        (beside / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        copy_companions(companions, beside)


def hf_config(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """The `config.json` of a model whose weights have this dtype.

    Raises:
      ValueError: names the fields that it cannot express.
    """
    described = config.to_hf()
    back = dataclasses.replace(
        ModelConfig.from_hf(described), mtp_steps=config.mtp_steps, router_init=config.router_init
    )
    lost = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name != "extra" and getattr(config, field.name) != getattr(back, field.name)
    ]
    if lost:
        raise ValueError(
            f"Hugging Face's {config.model_type} has no {', '.join(lost)}; such a model can be "
            "kept in our checkpoints only"
        )
    if not described.get("architectures"):
        described["architectures"] = [_ARCHITECTURES[config.model_type]]
    keys = [key for key in ("torch_dtype", "dtype") if key in described] or ["torch_dtype"]
    return {**described, **dict.fromkeys(keys, dtype.name)}


def expert_layouts(name: str) -> tuple[str, ...]:
    """The parts of a model ("model", "mtp") whose experts are fused.

    Raises:
      ValueError: there is no such layout.
    """
    if name not in EXPERT_LAYOUTS:
        raise ValueError(
            f"expert_layout={name!r} is unknown; expected {' or '.join(map(repr, EXPERT_LAYOUTS))}"
        )
    return EXPERT_LAYOUTS[name]


@contextlib.contextmanager
def replacing_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new directory beside this one, which replaces it at the end or is removed on errors.

    Raises:
      FileExistsError: the directory holds something, or it cannot be replaced.
    """
    directory = directory.resolve()  # so that the target of a link is replaced, not the link
    if directory.is_mount():
        raise FileExistsError(
            f"{directory} is a mount point, which nothing can take the place of; name a directory "
            "inside it"
        )
    if directory == pathlib.Path.cwd():
        raise FileExistsError(
            f"{directory} is the directory you are in, which would be replaced under your feet; "
            "name another one"
        )
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(
            f"{directory} exists; nothing is overwritten, name another or empty it"
        )
    beside = partial_path(directory)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in (*beside.rglob("*"), beside):
            safetensors_files.sync(path)
        beside.rename(directory)  # takes the place of an empty directory, too
    except BaseException:
        # Threads of an interrupted writer may still be adding to it.
        for _ in range(100):
            shutil.rmtree(beside, ignore_errors=True)
            if not beside.exists():
                break
            time.sleep(0.1)
        raise
    safetensors_files.sync(directory.parent)


def copy_companions(source: pathlib.Path | None, directory: pathlib.Path) -> None:
    """Copies the tokenizer files that exist in `source`."""
    if source is None:
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    if (more := source / ADDITIONAL_TEMPLATES).is_dir():
        shutil.copytree(more, directory / more.name)


def checked_table(
    config: ModelConfig,
    layout: FileLayout,
    parameters: Mapping[str, Any] | None = None,
    new: Collection[str] = (),
) -> TensorTable:
    """The table that maps a config's parameters to Hugging Face tensors.

    Args:
      config: the model's.
      layout: how the files store experts and the output head.
      parameters: arrays or shapes by path, which must be those of the config; None: not checked.
      new: see `TensorTable`.

    Raises:
      ValueError: names every missing, unexpected and misshapen parameter.
    """
    wanted = parameter_shapes(config)
    given = wanted if parameters is None else {path: p.shape for path, p in parameters.items()}
    if problems := shape_mismatches(wanted, given):
        raise ValueError(
            "Hugging Face has no model with these parameters (merge adapters into the weights that "
            "they change):\n  " + "\n  ".join(problems)
        )
    return TensorTable(config, layout, wanted, new)


def _head_mismatch(take: Take, layout: FileLayout, table: TensorTable) -> list[str]:
    if not layout.tied_head:
        return []
    if _same_bits(take, table.parameters[_EMBED], *table.tensors_of(_EMBED)):
        return []
    return [
        "lm_head.weight differs from model.embed_tokens.weight, but the config says "
        "tie_word_embeddings"
    ]


def _same_bits(take: Take, shape: tuple[int, ...], *names: str) -> bool:
    """Whether tensors of this shape are equal to the bit."""
    rows = max(1, 2**24 // shape[1])

    def bits(name: str, first: int) -> bytes:
        return take(name, lambda t: t[first : first + rows]).tobytes()

    return all(len({bits(name, i) for name in names}) == 1 for i in range(0, shape[0], rows))


def _refused(directory: pathlib.Path, problems: list[str]) -> ValueError:
    by_kind: dict[str, list[str]] = {}
    for problem in problems:
        by_kind.setdefault(problem.partition(":")[0], []).append(problem)
    lines = []
    for kind, of_kind in by_kind.items():
        lines += of_kind[:_MOST_LINES]
        if len(of_kind) > _MOST_LINES:
            lines.append(f"{kind}: {len(of_kind) - _MOST_LINES} more")
    return ValueError(f"{directory} cannot be loaded:\n  " + "\n  ".join(lines))
