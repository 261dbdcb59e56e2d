"""A model's parameters by path: their shapes and dtypes, and a model built from them one by one.

A path is a parameter's place in the model's state, such as `groups/layers/0/mlp/router`.
"""

import functools
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwen3next_jax.checkpoint import safetensors_files
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.parallel.mesh import parameter_shardings


def build_model(
    config: ModelConfig,
    value: Callable[[str, jax.sharding.Sharding | None], jax.Array],
    *,
    dtype: Any,
    mesh: Mesh | None,
    unstacked: bool,
) -> Qwen3Next:
    """Builds a model from parameters that are created one by one.

    Args:
      config: the model's shape.
      value: function that creates a parameter from its path and sharding; layers are stacked.
      dtype: dtype of activations.
      mesh: mesh over which parameters are sharded; None: the default device, see `read_array`.
      unstacked: whether to build the model that `Qwen3Next.unstacked` returns. Each stacked
        parameter is split as soon as it is created, so only one is in memory twice.
    """

    def new() -> Qwen3Next:
        return Qwen3Next(config, rngs=nnx.Rngs(0), dtype=dtype)

    graph, params = nnx.split(nnx.eval_shape(new))
    shardings: dict[str, jax.sharding.Sharding | None] = dict.fromkeys(parameters_by_path(params))
    if mesh is not None:
        placed = parameters_by_path(parameter_shardings(params, mesh))
        shardings = {path: param.get_value() for path, param in placed.items()}
    if not unstacked:
        return nnx.merge(
            graph, map_parameters(params, lambda path, _: value(path, shardings[path]))
        )

    graph, params = nnx.split(nnx.eval_shape(lambda: new().unstacked()))
    cut_up = jax.jit(tuple)
    groups: dict[str, tuple[jax.Array, ...]] = {}

    def part(path: str, _: Any) -> jax.Array:
        if not path.startswith("groups/"):
            return value(path, shardings[path])
        _, group, rest = path.split("/", 2)
        stacked = f"groups/{rest}"
        if stacked not in groups:
            groups[stacked] = cut_up(value(stacked, shardings[stacked]))
        return groups[stacked][int(group)]

    return nnx.merge(graph, map_parameters(params, part))


def map_parameters(params: nnx.State, value: Callable[[str, Any], jax.Array]) -> nnx.State:
    """A state with each parameter replaced by `value(path, parameter)`."""
    found = []
    for path, param in nnx.to_flat_state(params):
        found.append((path, param.replace(value("/".join(map(str, path)), param.get_value()))))
    return nnx.from_flat_state(found)


@functools.lru_cache(maxsize=8)  # tracing the model takes half a second
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a model's parameters by path; nothing is allocated."""
    model = nnx.eval_shape(lambda: Qwen3Next(config, rngs=nnx.Rngs(0)))
    shapes = {path: p.shape for path, p in parameters_by_path(nnx.state(model, nnx.Param)).items()}
    return types.MappingProxyType(shapes)  # all callers share it


def parameters_by_path(params: Any) -> dict[str, Any]:
    """The parameters of a model's state by path, such as `groups/layers/0/mlp/router`."""
    return {"/".join(map(str, path)): p for path, p in nnx.to_flat_state(params)}


def final_dtype(path: str, stored: Any, dtype: Any) -> Any:
    """The requested dtype, or `stored` if that is None or for `A_log` and `dt_bias`.

    Raises:
      ValueError: the requested dtype is neither float32 nor bfloat16.
    """
    if dtype is None:
        return stored
    try:
        asked = np.dtype(dtype)
    except TypeError:
        asked = None
    if asked not in safetensors_files.DTYPES.values():
        raise ValueError(f"{dtype=} is not supported; expected 'float32' or 'bfloat16'")
    return stored if path.endswith(("/A_log", "/dt_bias")) else asked


def shape_mismatches(
    wanted: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    lost: Collection[str] = (),
) -> list[str]:
    """Names the arrays that are missing, unexpected or of another shape than wanted.

    Args:
      wanted: expected shapes by name.
      shapes: actual shapes by name.
      lost: names that are missing for a reason already reported.
    """
    known = {*shapes, *lost}
    problems = [f"missing: {name} {list(s)}" for name, s in wanted.items() if name not in known]
    for name, shape in shapes.items():
        if name not in wanted:
            problems.append(f"unexpected: {name} {list(shape)}")
        elif tuple(shape) != wanted[name]:
            problems.append(f"wrong shape: {name} is {list(shape)}, expected {list(wanted[name])}")
    return problems
