"""A model from whatever kind of checkpoint a path leads to.

There are three: a Hugging Face directory, a work directory of ours (a run's, or one that `convert`
made) and one of the latter's step folders. Their `config.json` tells them apart.
"""

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3next_jax.checkpoint.hugging_face import abstract_parameters, build_model, cast, load_hf
from qwen3next_jax.checkpoint.store import CheckpointStore, DamagedCheckpointError
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.decoder import Qwen3Next

Result = TypeVar("Result")


class OurCheckpoint(NamedTuple):
    """A work directory, and the step in it that is meant."""

    workdir: pathlib.Path
    step: int | None  # None: the newest good one
    config: ModelConfig
    compute: str | None  # the dtype of activations, where the work directory says


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> Qwen3Next:
    """Loads a model to use it, not to go on with its training.

    Args:
      path: a Hugging Face directory, a work directory of ours, whose newest good checkpoint is
        taken, or a step folder such as `runs/tiny/checkpoints/300`.
      dtype: of the parameters but `A_log` and `dt_bias`, and of activations. None: as stored, and
        for activations what the run computed in, else the embedding's.
      mesh: over which the parameters are split; None: one device.
      rope_scaling: replaces the config's.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the path is none of these, or what is there does not fit together; names all
        that does not.
      DamagedCheckpointError: what could be meant is damaged.
    """
    ours = find_checkpoint(pathlib.Path(path))
    if ours is None:
        return load_hf(path, dtype, mesh, rope_scaling=rope_scaling)
    config = ours.config
    if rope_scaling is not None:
        config = dataclasses.replace(config, rope_scaling=dict(rope_scaling))

    def build(store: CheckpointStore, step: int) -> Qwen3Next:
        stored = stored_parameters(store, step, config)
        compute = dtype or ours.compute or stored["embed_tokens"].dtype

        def value(name: str, sharding: jax.sharding.Sharding) -> jax.Array:
            x = stored[name]
            wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
            state, _ = store.restore(step, {"params": wanted}, partial=True)
            return state["params"][name].astype(cast(name, x.dtype, dtype))

        return build_model(config, value, dtype=jnp.dtype(compute), mesh=mesh)

    return from_step(ours, build)


def find_checkpoint(path: pathlib.Path) -> OurCheckpoint | None:
    """The checkpoint of ours that a path leads to; None for a Hugging Face directory.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: it leads to neither.
    """
    path = path.absolute()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {_EXPECTED}")
    for workdir, step in ((path, None), (path.parents[1], path.name)):
        if not (workdir / "config.json").is_file():
            continue
        if step is not None and (path.parent.name != "checkpoints" or not step.isdigit()):
            continue
        try:
            given = json.loads((workdir / "config.json").read_text())
            kinds = {kind for kind in ("model", "model_type") if kind in given}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{workdir / 'config.json'} cannot be read: {error}") from None
        if kinds == {"model_type"} and step is None:
            return None
        if kinds == {"model"}:
            return OurCheckpoint(
                workdir,
                None if step is None else int(step),
                ModelConfig.from_hf(given["model"]),
                given.get("precision", {}).get("compute"),
            )
    raise ValueError(f"{path} is no checkpoint; {_EXPECTED}")


def from_step(ours: OurCheckpoint, make: Callable[[CheckpointStore, int], Result]) -> Result:
    """What `make` makes of the step that is meant, or of the newest that is not damaged."""
    with closing(CheckpointStore(ours.workdir / "checkpoints")) as store:
        if ours.step is not None:
            return make(store, ours.step)
        if not store.steps():
            raise FileNotFoundError(f"no checkpoint in {store.directory}")
        for step in store.steps():
            try:
                return make(store, step)
            except DamagedCheckpointError as error:
                warnings.warn(f"{error}\nTrying the one before it.", stacklevel=2)
        raise DamagedCheckpointError(f"all checkpoints in {store.directory} are damaged")


def stored_parameters(
    store: CheckpointStore, step: int, config: ModelConfig
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a checkpoint's parameters, by path.

    Raises:
      ValueError: they are not those of the config; names each that differs.
      DamagedCheckpointError: the checkpoint's index is damaged.
    """
    arrays, _ = store.describe(step)
    found = {n.removeprefix("params/"): x for n, x in arrays.items() if n.startswith("params/")}
    wanted = {path: tuple(p.shape) for path, p in abstract_parameters(config).items()}
    problems = [f"missing: {path} {list(shape)}" for path, shape in wanted.items()
                if path not in found]  # fmt: skip
    for path, x in found.items():
        if path not in wanted:
            problems.append(f"unexpected: {path} {list(x.shape)}")
        elif x.shape != wanted[path]:
            problems.append(
                f"wrong shape: {path} is {list(x.shape)}, expected {list(wanted[path])}"
            )
    if problems:
        raise ValueError(
            f"{store.directory / str(step)} does not fit its config.json:\n  "
            + "\n  ".join(problems)
        )
    return {path: found[path] for path in wanted}


_EXPECTED = (
    "expected a Hugging Face directory (config.json and safetensors), a work directory of a run or "
    "a conversion (config.json and checkpoints/), or one of its step folders, say checkpoints/300"
)
