"""A model's parameters by path: their shapes and dtypes, and a model built from them one by one.

A path is a parameter's place in the model's state, such as `groups/layers/0/mlp/router`, as
`parallel/names.py` spells it.
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
from qwen3next_jax.parallel.names import map_leaves, named_leaves


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
    shardings: dict[str, jax.sharding.Sharding] = {}
    if mesh is not None:
        shardings = dict(named_leaves(parameter_shardings(params, mesh)))

    def whole(path: str, _: Any = None) -> jax.Array:
        return value(path, shardings.get(path))

    if not unstacked:
        return nnx.merge(graph, map_leaves(whole, params))

    graph, params = nnx.split(nnx.eval_shape(lambda: new().unstacked()))
    cut_up = jax.jit(tuple)
    groups: dict[str, tuple[jax.Array, ...]] = {}

    def part(path: str, _: Any) -> jax.Array:
        if not path.startswith("groups/"):
            return whole(path)
        _, group, rest = path.split("/", 2)
        stacked = f"groups/{rest}"
        if stacked not in groups:
            groups[stacked] = cut_up(whole(stacked))
        return groups[stacked][int(group)]

    return nnx.merge(graph, map_leaves(part, params))


@functools.lru_cache(maxsize=8)  # tracing the model takes half a second
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a model's parameters by path; nothing is allocated."""
    model = nnx.eval_shape(lambda: Qwen3Next(config, rngs=nnx.Rngs(0)))
    shapes = {path: x.shape for path, x in named_leaves(nnx.state(model, nnx.Param))}
    return types.MappingProxyType(shapes)  # all callers share it


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
