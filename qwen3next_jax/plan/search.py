"""Ranks the ways to lay a run out on a machine by the arithmetic of `costs.py`."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from qwen3next_jax.config import FULL, LINEAR, RunConfig
from qwen3next_jax.parallel.mesh import AXES
from qwen3next_jax.plan import costs

_CHUNK = 64  # tokens that a context shard holds a multiple of


class Layout(NamedTuple):
    """One way, and what it is expected to cost a device."""

    config: RunConfig
    mesh: dict[str, int]
    memory_bytes: float
    step_seconds: tuple[float, float]


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there."""
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=types)


def rank(
    config: RunConfig, params: nnx.State, chip: Any, places: int, *, optimizer_width: float
) -> list[Layout]:
    """All meshes and choices of `train.remat` that fit, the fastest first.

    Args:
      config: of the run; its mesh and remat are what is searched.
      params: shapes of the model's parameters.
      chip: what a device is.
      places: how many of them there are.
      optimizer_width: bytes of optimizer state a parameter.
    """
    found = []
    for mesh in _meshes(config, places):
        try:
            laid_out = costs.weights(params, abstract_mesh(mesh))
        except ValueError:
            continue  # a dimension that the mesh does not divide
        for remat in ("none", "layer"):
            changed = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, remat=remat),
                mesh=dataclasses.replace(config.mesh, **mesh),
            )
            memory = costs.memory(changed, laid_out, mesh, optimizer_width=optimizer_width)
            total = sum(memory.values())
            if total <= chip.hbm:
                seconds = costs.step_seconds(changed, laid_out, mesh, chip)
                found.append(Layout(changed, mesh, total, seconds))
    return sorted(found, key=lambda layout: sum(layout.step_seconds))


def _meshes(config: RunConfig, places: int) -> Iterator[dict[str, Any]]:
    """Sizes of the axes that multiply to `places` and divide what each of them splits."""
    c, t = config.model, config.train
    rows = t.global_batch_size // t.gradient_accumulation_steps
    divisors = [d for d in range(1, places + 1) if places % d == 0]
    for expert, context, tensor, fsdp in itertools.product(divisors, repeat=4):
        split = expert * context * tensor * fsdp
        if split > places or places % split:
            continue
        data = places // split
        if rows % (data * fsdp * expert) or t.sequence_length % (context * _CHUNK):
            continue
        if expert > 1 and (not c.num_experts or c.num_experts % expert):
            continue
        heads = [c.num_attention_heads] if FULL in c.mixers else []
        heads += [c.linear_num_key_heads] if LINEAR in c.mixers else []
        if any(n % tensor for n in heads):
            continue
        yield dict(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
