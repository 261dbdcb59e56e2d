"""The device mesh, and THE table that says over which of its axes each kind of dimension is split.

Parameters name their axes logically where they are declared ("embed", "experts", ...). Nothing but
the table below maps these to the mesh, so a change of layout is a change of one line, and a name
that the table does not know is an error. Mesh axes: `data` holds copies of the parameters, `fsdp`
holds slices of them; the batch is split over both.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3next_jax.config import MeshConfig

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)

TABLE: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": None,
    "heads": None,
    "kv_heads": None,
    "key_heads": None,
    "value_heads": None,
    "head_dim": None,
    "conv": None,
    "mlp": None,
    "experts": None,
    "expert_mlp": None,
    "router": None,
    "pair": None,
    "norm": None,
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges the devices; an axis of -1 takes what the other leaves.

    Raises:
      ValueError: if the axes' sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = 1
    for size in sizes.values():
        fixed *= size if size > 0 else 1
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(len(devices) // fixed, 1)
            fixed *= sizes[axis]
    if fixed != len(devices):
        raise ValueError(
            f"The mesh {sizes} has {fixed} places for {len(devices)} devices; set one of "
            f"{', '.join('mesh.' + axis for axis in AXES)} to -1"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, devices=devices,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    )  # fmt: skip


def parameter_shardings(params: nnx.State, mesh: Mesh) -> nnx.State:
    """The sharding of each parameter, from its axes' names.

    Raises:
      ValueError: names the parameter and axis that the table does not know or the mesh cannot
        divide.
    """
    flat = []
    for path, param in nnx.to_flat_state(params):
        spec = _spec("/".join(map(str, path)), param.axes, param.shape, mesh.shape)
        flat.append((path, param.replace(NamedSharding(mesh, spec))))
    return nnx.from_flat_state(flat)


def _spec(
    name: str, axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mapping[str, int]
) -> PartitionSpec:
    # Parameters of layers have one axis more than their declaration, the stacked one in front.
    entries: list[Any] = [None] * (len(shape) - len(axes))
    for axis, size in zip(axes, shape[len(entries) :], strict=True):
        if axis not in TABLE:
            raise ValueError(f"{name}: the axis {axis!r} is not in parallel/mesh.py's TABLE")
        mesh_axis = TABLE[axis]
        ways = 1 if mesh_axis is None else mesh[mesh_axis]
        if size % ways:
            choices = [d for d in range(1, size + 1) if size % d == 0 and d <= 2 * ways]
            raise ValueError(
                f"{name}: {axis}={size} is not divisible by mesh axis {mesh_axis}={ways}; choose a "
                f"divisor, such as {choices[-1]}"
            )
        # One mesh axis can split one dimension only; a square matrix is split along its first.
        entries.append(None if mesh_axis in entries else mesh_axis)
    return PartitionSpec(*entries)
