"""What a run compiles: the model's structure, its state's shapes and shardings, and the step.

Nothing here is allocated: training draws or restores the state in these shapes, and the plan
compiles the same step for machines that need not be present.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qwen3next_jax.checkpoint.parameters import final_dtype
from qwen3next_jax.config import RunConfig
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.ops.platform import compiler_options
from qwen3next_jax.parallel.layout import check_fits
from qwen3next_jax.parallel.mesh import BATCH, parameter_shardings
from qwen3next_jax.parallel.names import map_leaves, named_leaves
from qwen3next_jax.training.loss import BATCH_DTYPES
from qwen3next_jax.training.optimizer import make_optimizer
from qwen3next_jax.training.step import (
    TrainState,
    initial_state,
    make_train_step,
    split_frozen,
)


class Program(NamedTuple):
    """A run's step on a mesh, and its abstract arguments."""

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState  # shapes, dtypes and shardings
    batch: dict[str, jax.ShapeDtypeStruct]  # shapes, dtypes and shardings
    step: Any  # jitted `make_train_step`, which donates the state


def make_program(config: RunConfig, mesh: Mesh | AbstractMesh) -> Program:
    """Builds the step of a run, to be called (or lowered) under `jax.set_mesh(mesh)`.

    Args:
      config: the run's config.
      mesh: the mesh; an abstract one suffices for the state's shapes and shardings.

    Raises:
      ValueError: the run does not fit the mesh, no rule updates a parameter, or
        `train.frozen_parameters` matches all of them or has a glob that matches none.
    """
    check_fits(config, mesh.shape)
    graph, params = abstract_model(config)
    trained, _ = split_frozen(params, config)
    optimizer, schedule = make_optimizer(
        config.optimizer,
        config.train.num_steps,
        trained,
        moment_dtype=jnp.dtype(config.precision.optimizer),
        zero_centered_norm=config.model.zero_centered_norm,
    )
    step = jax.jit(
        make_train_step(graph, optimizer, schedule, config),
        donate_argnums=0,
        compiler_options=compiler_options(config.precision.compute),
    )
    state = place_state(jax.eval_shape(lambda p: initial_state(p, optimizer, config), params), mesh)
    return Program(graph, optimizer, state, _abstract_batch(config, mesh), step)


def abstract_model(config: RunConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and the shapes of its parameters; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: new_model(config)))


def new_model(config: RunConfig) -> Qwen3Next:
    """The model with its initial weights."""
    model = Qwen3Next(
        config.model,
        rngs=nnx.Rngs(config.train.seed),
        param_dtype=jnp.dtype(config.precision.parameters),
        dtype=jnp.dtype(config.precision.compute),
        remat=config.train.remat,
        moe_buffer_factor=config.mesh.moe_buffer_factor,
    )
    if dtype := config.precision.frozen:
        _, frozen = split_frozen(nnx.state(model, nnx.Param), config)
        nnx.update(model, map_leaves(lambda n, x: x.astype(final_dtype(n, x.dtype, dtype)), frozen))
    return model


def place_state(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Gives a state's arrays their shardings; moments are sharded like their parameters.

    Args:
      state: shapes and dtypes; shardings of another mesh are replaced.
      mesh: the mesh, possibly abstract.

    Raises:
      ValueError: a parameter is not divisible by its mesh axes.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_name = dict(named_leaves(parameter_shardings(state.params, mesh)))
    shapes = {name: x.shape for name, x in named_leaves(state.params)}

    def place(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owners = [p for p in by_name if name.endswith("/" + p) and shapes[p] == x.shape]
        owner = max(owners, key=len, default=None)  # "mtp/norm/weight" before "norm/weight"
        sharding = everywhere if owner is None else by_name[owner]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return map_leaves(place, state)


def _abstract_batch(
    config: RunConfig, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.train.global_batch_size, config.train.sequence_length)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))
        for name, dtype in BATCH_DTYPES.items()
    }
