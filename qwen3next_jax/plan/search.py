"""Ranks meshes and remat choices for a run by the arithmetic of `costs.py`."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from qwen3next_jax.config import REMAT, RunConfig, divisors
from qwen3next_jax.parallel.layout import check_copies, check_fits
from qwen3next_jax.parallel.mesh import AXES, axis_sizes
from qwen3next_jax.parallel.names import named_leaves
from qwen3next_jax.plan import costs
from qwen3next_jax.plan.chips import Chip
from qwen3next_jax.training.program import place_state
from qwen3next_jax.training.step import TrainState


class Candidate(NamedTuple):
    """A mesh and a choice of remat, with their estimated memory per device and step time."""

    config: RunConfig
    mesh: dict[str, int]
    memory_bytes: float
    step_seconds: tuple[float, float]


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of these sizes without devices."""
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=types)


def check_trains(config: RunConfig, state: TrainState, sizes: dict[str, int]) -> None:
    """Checks a mesh as training does.

    Args:
      config: the run's config.
      state: shapes of the training state.
      sizes: sizes of the mesh axes.

    Raises:
      ValueError: the run is not divisible by the mesh, or too much of the state is replicated.
    """
    check_fits(config, sizes)
    _check_copies(config, state, sizes)


def _check_copies(config: RunConfig, state: TrainState, sizes: dict[str, int]) -> None:
    placed = named_leaves(place_state(state, abstract_mesh(sizes)))
    check_copies(placed, sizes, max_replicated=config.mesh.max_replicated)


def rank(
    config: RunConfig, state: TrainState, chip: Chip, places: int, *, optimizer_width: float
) -> list[Candidate]:
    """All meshes and choices of `train.remat` that fit, the fastest first.

    Args:
      config: the run's config, whose mesh and remat are replaced.
      state: shapes of the training state.
      chip: type of the devices.
      places: number of devices.
      optimizer_width: bytes of optimizer state per parameter that is not frozen.
    """
    candidates = []
    for mesh in _meshes(places):
        on_mesh = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
        try:
            sizes = axis_sizes(on_mesh.mesh, places)
            check_fits(on_mesh, sizes)
            laid_out = costs.weights(
                state.params, abstract_mesh(mesh), config.train.frozen_parameters
            )
        except ValueError:
            continue
        fitting = []
        for remat in REMAT:
            train = dataclasses.replace(config.train, remat=remat)
            changed = dataclasses.replace(on_mesh, train=train)
            memory = costs.memory(changed, laid_out, mesh, optimizer_width=optimizer_width)
            total = sum(memory.values())
            if total <= chip.hbm:
                seconds = costs.step_seconds(changed, laid_out, mesh, chip)
                fitting.append(Candidate(changed, mesh, total, seconds))
        if fitting:
            with contextlib.suppress(ValueError):
                _check_copies(on_mesh, state, sizes)  # last, as it takes longest
                candidates += fitting
    # Of equals the one that splits experts least: in a dense model that is another name for fsdp.
    return sorted(candidates, key=lambda c: (sum(c.step_seconds), c.mesh["expert"]))


def _meshes(places: int) -> Iterator[dict[str, Any]]:
    """All sizes of the axes that multiply to `places`."""
    for sizes in itertools.product(divisors(places), repeat=len(AXES) - 1):
        if places % math.prod(sizes) == 0:
            yield dict(zip(AXES, (places // math.prod(sizes), *sizes), strict=True))
