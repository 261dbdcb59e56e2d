"""Loads a model, or the initial parameters of a run, from any kind of checkpoint.

A path may lead to a Hugging Face directory, to a work directory of ours (of a run, or made by
`convert`), or to one step folder of a work directory. `config.json` tells which it is.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from qwen3next_jax.checkpoint.hugging_face import describe_hf, load_hf, open_hf, read_parameter
from qwen3next_jax.checkpoint.parameters import (
    build_model,
    final_dtype,
    parameter_shapes,
    shape_mismatches,
)
from qwen3next_jax.checkpoint.store import CheckpointStore
from qwen3next_jax.config import ModelConfig, read_json
from qwen3next_jax.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.parallel.names import map_leaves, named_leaves

Result = TypeVar("Result")


class OurCheckpoint(NamedTuple):
    """One of our work directories, and the step to use."""

    workdir: pathlib.Path
    step: int | None  # None: the newest good one
    config: ModelConfig
    compute: str | None  # dtype of activations; None: not recorded
    matmul: str | None  # precision of matrix products; None: not recorded


class OpenCheckpoint(NamedTuple):
    """A checkpoint's config and tokenizer, before its parameters are read."""

    ours: OurCheckpoint | None  # None: a Hugging Face directory
    config: ModelConfig
    tokenizer: Tokenizer


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    unstacked: bool = False,
) -> Qwen3Next:
    """Loads a model for inference or evaluation; `CheckpointStore` resumes training.

    Args:
      path: a Hugging Face directory, a work directory of ours, whose newest good checkpoint is
        taken, or a step folder such as `runs/tiny/checkpoints/300`.
      dtype: dtype of activations and of the parameters except `A_log` and `dt_bias`. None:
        parameters as stored, activations as in the run, or else in the embedding's dtype.
      mesh: mesh over which the parameters are sharded; None: one device.
      rope_scaling: replacement for the config's; {} disables YaRN.
      unstacked: whether to store each layer's parameters separately, see `Qwen3Next.unstacked`.
        `generate` need not copy such a model.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the path is none of these, or its files do not fit together; names everything
        that does not fit.
      DamagedCheckpointError: the step, or every step of the work directory, is damaged.
    """
    ours = find_checkpoint(pathlib.Path(path))
    if ours is None:
        return load_hf(path, dtype, mesh, rope_scaling=rope_scaling, unstacked=unstacked)
    config = ours.config
    if rope_scaling is not None:
        config = dataclasses.replace(config, rope_scaling=rope_scaling)

    def build(store: CheckpointStore, step: int) -> Qwen3Next:
        stored = stored_parameters(store, step, config)
        compute = dtype or ours.compute or stored["embed_tokens"].dtype

        def value(name: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
            x = jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype, sharding=sharding)
            return _restore_parameter(store, step, name, x, final_dtype(name, x.dtype, dtype))

        return build_model(config, value, dtype=jnp.dtype(compute), mesh=mesh, unstacked=unstacked)

    model = from_step(ours, build)
    model.source = str(ours.workdir)
    return model


def load_parameters(
    path: str | os.PathLike[str],
    config: ModelConfig,
    wanted: nnx.State,
    new: Mapping[str, jax.Array] | None = None,
) -> nnx.State:
    """Reads the initial parameters of a training run.

    Parameters are read one after another, each straight to its devices and in its final dtype, so
    that no device and no process holds more than its shards of the model.

    Args:
      path: see `load_checkpoint`.
      config: the run's model. It may differ from the checkpoint's only in keys that do not change
        the meaning of the weights: length of the context and YaRN, coefficient of the balance loss,
        number of MTP steps, and initialisation.
      wanted: the run's parameters as jax.ShapeDtypeStructs with shardings. If modules of the model
        were replaced, the checkpoint must hold the replacements' parameters but those in `new`.
      new: parameters by path, which are taken as they are; the checkpoint may lack them, or hold
        others in their place. None: all are read.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the checkpoint is of another model; names all keys that differ. Or see
        `load_checkpoint`.
      DamagedCheckpointError: the step, or every step of the work directory, is damaged.
    """
    new = new or {}
    ours = find_checkpoint(pathlib.Path(path))
    shapes = {name: tuple(x.shape) for name, x in named_leaves(wanted)}

    def check(checkpoint: str | os.PathLike[str], found: Mapping[str, tuple[int, ...]]) -> None:
        both = ({n: s for n, s in given.items() if n not in new} for given in (shapes, found))
        _check_shapes(checkpoint, "the run's model", *both)

    def with_new(read: Callable[[str, jax.ShapeDtypeStruct], jax.Array]) -> nnx.State:
        return map_leaves(lambda n, x: new[n] if n in new else read(n, x), wanted)

    if ours is None:
        hf = open_hf(pathlib.Path(path), new=new)
        _require_same(path, config, hf.config, new)
        check(path, hf.table.parameters)
        return with_new(lambda name, x: read_parameter(hf, name, x.sharding, x.dtype))
    _require_same(path, config, ours.config, new)

    def read(store: CheckpointStore, step: int) -> nnx.State:
        stored = _stored(store, step)
        check(store.directory / str(step), {name: x.shape for name, x in stored.items()})

        def value(name: str, x: jax.ShapeDtypeStruct) -> jax.Array:
            there = jax.ShapeDtypeStruct(x.shape, stored[name].dtype, sharding=x.sharding)
            return _restore_parameter(store, step, name, there, x.dtype)

        return with_new(value)

    return from_step(ours, read)


def check_same_model(
    path: str | os.PathLike[str], config: ModelConfig, new: Collection[str] = ()
) -> None:
    """Raises the ValueError that `load_parameters` would, without reading the weights.

    Args:
      path, config: arguments of `load_parameters`.
      new: the paths of its `new` parameters.
    """
    ours = find_checkpoint(pathlib.Path(path))
    found = open_hf(pathlib.Path(path), new=new).config if ours is None else ours.config
    _require_same(path, config, found, new)


def open_checkpoint(
    path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> OpenCheckpoint:
    """Opens a checkpoint for text, with all checks that are possible before the model is read.

    Args:
      path: see `load_checkpoint`, which then reads the model.
      tokenizer: file or directory; None: the checkpoint's own.

    Raises:
      FileNotFoundError: there is no checkpoint, or no tokenizer.
      ValueError: the path leads to no checkpoint, to one of another kind of model, or the tokenizer
        has more tokens than the model.
    """
    ours = find_checkpoint(pathlib.Path(path))
    config = describe_hf(pathlib.Path(path)) if ours is None else ours.config
    found = load_tokenizer(tokenizer or (path if ours is None else ours.workdir))
    check_vocabulary(found, config.vocab_size)
    return OpenCheckpoint(ours, config, found)


def checkpoint_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The model of a checkpoint, read from its config.json and the names of its tensors alone.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the path leads to none, or to one of another kind of model.
    """
    ours = find_checkpoint(pathlib.Path(path))
    return describe_hf(pathlib.Path(path)) if ours is None else ours.config


def find_checkpoint(path: pathlib.Path) -> OurCheckpoint | None:
    """Finds our checkpoint at a path; None for a Hugging Face directory.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: it leads to neither.
    """
    path = pathlib.Path(os.path.abspath(path))  # without "..", of which links are not followed
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {_EXPECTED}")
    for workdir, step in ((path, None), (path.parent.parent, path.name)):
        if not (workdir / "config.json").is_file():
            continue
        if step is not None and (path.parent.name != "checkpoints" or not step.isdigit()):
            continue
        given = read_json(workdir / "config.json")
        kinds = given.keys() & {"model", "model_type"}
        if kinds == {"model_type"} and step is None:
            return None
        if kinds == {"model"}:
            return OurCheckpoint(
                workdir,
                None if step is None else int(step),
                ModelConfig.from_hf(given["model"]),
                given.get("precision", {}).get("compute"),
                given.get("precision", {}).get("matmul"),
            )
    raise ValueError(f"{path} is no checkpoint; {_EXPECTED}")


def as_trained(ours: OurCheckpoint | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products have the precision that the run trained with.

    It does nothing where the precision is unknown, as for a Hugging Face directory (None).
    """
    if ours is None or ours.matmul is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(ours.matmul)


def from_step(ours: OurCheckpoint, make: Callable[[CheckpointStore, int], Result]) -> Result:
    """Calls `make(store, step)` with the step of `ours`, or the newest that is not damaged."""
    with closing(CheckpointStore(ours.workdir / "checkpoints")) as store:
        if ours.step is not None:
            return make(store, ours.step)
        return store.newest_good(lambda step: make(store, step))


def stored_parameters(
    store: CheckpointStore, step: int, config: ModelConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a checkpoint's parameters, by path.

    Raises:
      ValueError: they are not those of the config; names each that differs.
      DamagedCheckpointError: the checkpoint's index is damaged.
    """
    found = _stored(store, step)
    wanted = parameter_shapes(config)
    shapes = {path: x.shape for path, x in found.items()}
    _check_shapes(store.directory / str(step), "its config.json", wanted, shapes)
    return {path: found[path] for path in wanted}


def _stored(store: CheckpointStore, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    arrays, _ = store.describe(step)
    return {n.removeprefix("params/"): x for n, x in arrays.items() if n.startswith("params/")}


def _check_shapes(
    checkpoint: str | os.PathLike[str],
    of: str,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    if problems := shape_mismatches(wanted, found):
        raise ValueError(f"{checkpoint} does not fit {of}:\n  " + "\n  ".join(problems))


# Keys in which a run's model may differ from that of its initial checkpoint.
_FREE = {
    "max_position_embeddings", "rope_scaling", "router_aux_loss_coef", "initializer_range",
    "router_init", "mtp_steps", "extra",
}  # fmt: skip
# Keys that describe the pattern of layers, which can be written in more than one way.
_LAYERS = {"full_attention_interval", "layer_types", "mlp_only_layers", "decoder_sparse_step"}


def _require_same(
    path: str | os.PathLike[str], config: ModelConfig, found: ModelConfig, new: Collection[str]
) -> None:
    free = set(_FREE)
    if config.layers == found.layers:
        free |= _LAYERS
    if all(sparse for _, sparse in [*config.layers, *found.layers]):
        free.add("intermediate_size")  # no layer uses it
    differing = [
        f"model.{field.name}={getattr(config, field.name)!r}, in the checkpoint "
        f"{getattr(found, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in free and getattr(config, field.name) != getattr(found, field.name)
    ]
    if config.mtp_steps and not found.mtp_steps and not any(n.startswith("mtp/") for n in new):
        differing.append(
            f"model.mtp_steps={config.mtp_steps}, but the checkpoint holds no MTP module; set it "
            "to 0 to train without one, or draw one by train.new_parameters=('mtp/*',)"
        )
    if found.mtp_steps and not config.mtp_steps:
        differing.append(
            f"model.mtp_steps=0, but the checkpoint holds an MTP module; set it to "
            f"{found.mtp_steps} to keep and train it"
        )
    if differing:
        raise ValueError(
            f"{path} holds another model than the run's config describes:\n  "
            + "\n  ".join(differing)
        )


def _restore_parameter(
    store: CheckpointStore, step: int, name: str, stored: jax.ShapeDtypeStruct, dtype: Any
) -> jax.Array:
    state, _ = store.restore(step, {"params": {name: stored}}, partial=True)
    return state["params"][name].astype(dtype)


_EXPECTED = (
    "expected a Hugging Face directory (config.json and safetensors), a work directory of a run or "
    "a conversion (config.json and checkpoints/), or one of its step folders (checkpoints/300)"
)
