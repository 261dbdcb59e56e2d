"""Ranks the ways to lay a run out on a machine by the arithmetic of `costs.py`."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from qwen3next_jax.config import REMAT, RunConfig, divisors
from qwen3next_jax.parallel.layout import check_fits
from qwen3next_jax.parallel.mesh import AXES, axis_sizes
from qwen3next_jax.plan import costs
from qwen3next_jax.plan.chips import Chip


class Candidate(NamedTuple):
    """A mesh and a choice of remat, and what they are expected to cost a device."""

    config: RunConfig
    mesh: dict[str, int]
    memory_bytes: float
    step_seconds: tuple[float, float]


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there."""
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=types)


def rank(
    config: RunConfig, params: nnx.State, chip: Chip, places: int, *, optimizer_width: float
) -> list[Candidate]:
    """All meshes and choices of `train.remat` that fit, the fastest first.

    Args:
      config: of the run; its mesh and remat are what is searched.
      params: shapes of the model's parameters.
      chip: what a device is.
      places: how many of them there are.
      optimizer_width: bytes of optimizer state a parameter.
    """
    found = []
    for mesh, remat in itertools.product(_meshes(places), REMAT):
        changed = dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, remat=remat),
            mesh=dataclasses.replace(config.mesh, **mesh),
        )
        try:
            check_fits(changed, axis_sizes(changed.mesh, places))
            laid_out = costs.weights(params, abstract_mesh(mesh))
        except ValueError:
            continue  # training would refuse it too
        memory = costs.memory(changed, laid_out, mesh, optimizer_width=optimizer_width)
        total = sum(memory.values())
        if total <= chip.hbm:
            seconds = costs.step_seconds(changed, laid_out, mesh, chip)
            found.append(Candidate(changed, mesh, total, seconds))
    return sorted(found, key=lambda candidate: sum(candidate.step_seconds))


def _meshes(places: int) -> Iterator[dict[str, Any]]:
    """All sizes of the axes that multiply to `places`."""
    for sizes in itertools.product(divisors(places), repeat=len(AXES) - 1):
        if places % math.prod(sizes) == 0:
            yield dict(zip(AXES, (places // math.prod(sizes), *sizes), strict=True))
