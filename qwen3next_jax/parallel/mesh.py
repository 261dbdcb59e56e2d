"""The device mesh, and THE table that says over which of its axes each kind of dimension is split.

Parameters name their axes logically where they are declared ("embed", "experts", ...), activations
where they are constrained ("batch", "tokens", ...). The table below maps these names to the mesh,
and a name that it does not know is an error. (What runs on a device's own part says itself over
which axis it talks: `expert.py`, `context.py`, `vocabulary.py`.) Mesh axes, from the slowest links
to the fastest:

- `data`: each device has copies of the parameters and its own rows of the batch. TPU slices lie
  along this axis.
- `fsdp`: each device has a slice of the parameters, which are all-gathered where they are used, and
  its own rows.
- `expert`: each device has its own experts, to which tokens travel; otherwise like `fsdp`.
- `context`: each device has its own stretch of every row's tokens; otherwise like `fsdp`.
- `tensor`: each device has its own heads and columns, for all tokens of its rows.

Modules are written for global arrays. They find the mesh through `jax.set_mesh`, which the training
loop calls around everything; without it, or on one device, they run as plain code.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qwen3next_jax.config import AXES, MeshConfig, axis_problems, divisors, nearest
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.ops.shapes import refuse_explicit
from qwen3next_jax.parallel.names import is_variable, map_leaves

ROWS = ("data", "fsdp", "expert")  # axes that split the rows of a batch
SLICES = ("fsdp", "context", "expert")  # axes that split the parameters, until they are used
BATCH = PartitionSpec(ROWS, "context")  # spec of arrays [B, T, ...]

# The mesh axes that split each dimension. An axis that already splits an earlier dimension of the
# same array is skipped: the model dimension of an expert's matrix is split over fsdp and context
# only.
TABLE: dict[str, tuple[str, ...]] = {
    # Parameters.
    "embed": SLICES,
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "key_heads": ("tensor",),
    "value_heads": ("tensor",),
    "head_dim": (),
    "conv": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    "router": (),
    "pair": (),
    "norm": (),
    # Activations.
    "batch": ROWS,
    "tokens": ("context",),
    "hidden": (),
    "layers": (),
}
# Replicated if there are more devices along the axes than heads, such as two KV heads on tensor=8.
_WHOLE_IF_FEWER = ("kv_heads",)
_UNSLICED = dict.fromkeys(SLICES, 1)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices in a mesh.

    With several TPU slices, the slices lie along `data`, so that only gradients cross the slow
    network between them. Devices that have no slice index are divided into equal consecutive runs.

    Args:
      config: sizes of the axes, of which -1 takes the remaining devices, and the number of slices.
      devices: devices to arrange; None: all.

    Raises:
      ValueError: if the axes' sizes do not multiply to the number of devices, or TPU devices are
        not a whole block of their torus.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = _slices(config, devices)
    sizes = axis_sizes(config, len(devices), len(slices))
    shape = (sizes["data"] // len(slices), *(sizes[axis] for axis in AXES[1:]))
    blocks = [_on_the_torus(shape, part) for part in slices]
    return Mesh(np.concatenate(blocks), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def fsdp_mesh(ways: int | None) -> Mesh | None:
    """Makes a mesh of all devices along `fsdp`.

    Args:
      ways: number of devices, or -1 for all; None: no mesh.

    Returns:
      The mesh, or None if ways is None.

    Raises:
      ValueError: if ways is not the number of devices.
    """
    if ways is None:
        return None
    if ways not in (-1, jax.device_count()):
        raise ValueError(
            f"--mesh_fsdp={ways}: there are {jax.device_count()} devices; give their number, or -1"
        )
    return make_mesh(MeshConfig(data=1, fsdp=ways))


def axis_sizes(
    config: MeshConfig, num_devices: int, num_slices: int | None = None
) -> dict[str, int]:
    """Computes the size of each mesh axis.

    Args:
      config: sizes of the axes, of which -1 takes the remaining devices.
      num_devices: number of devices in all slices together.
      num_slices: number of slices; None: the config's number, or 1 if that is -1.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, one is neither positive nor
        -1, several are -1, or the number of slices does not divide `data`.
    """
    if problems := list(axis_problems(config)):
        raise ValueError("; ".join(problems))
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values() and num_devices % fixed:
        given = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
        works = nearest(divisors(num_devices), fixed)
        raise ValueError(
            f"{num_devices} devices are not divisible by {given}; {works} in all would work"
        )
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(num_devices // fixed, 1)
            fixed *= sizes[axis]
    if fixed != num_devices:
        raise ValueError(
            f"The mesh {sizes} has {fixed} places for {num_devices} devices; set one of "
            f"{', '.join('mesh.' + axis for axis in AXES)} to -1"
        )
    num_slices = max(config.num_slices, 1) if num_slices is None else num_slices
    if sizes["data"] % num_slices:
        works = nearest(divisors(num_devices), num_slices)
        raise ValueError(
            f"mesh.data={sizes['data']} is not divisible by mesh.num_slices={num_slices}; slices "
            "lie along data: "
            + (
                f"make it {num_slices} or a multiple"
                if num_devices % num_slices == 0
                else f"{num_devices} devices make {works} of one size"
            )
        )
    return sizes


def _slices(config: MeshConfig, devices: list[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each slice."""
    # Only for TPUs: for GPUs `slice_index` is the host, and the config says how hosts are grouped.
    numbers = sorted({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"} or {0})
    wanted = len(numbers) if config.num_slices == -1 else config.num_slices
    if len(numbers) == 1 and len(devices) % wanted == 0:  # devices without a slice index
        size = len(devices) // wanted
        return [devices[i : i + size] for i in range(0, len(devices), size)]
    if len(numbers) != wanted:
        raise ValueError(
            f"mesh.num_slices={config.num_slices}, but the {len(devices)} devices lie in "
            f"{len(numbers)} slices; set it to {len(numbers)}, or to -1"
        )
    return [[d for d in devices if d.slice_index == number] for number in numbers]


def _on_the_torus(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Arranges the devices of a slice so that the last axes lie along the fastest links.

    A mesh axis takes whole axes of the torus, or a part of one if no whole ones fit, as 32 ways on
    4 x 4 x 4. So every mesh shape fits, but the devices must be a block of the torus without holes.
    """
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError) as error:
        chips = sorted(getattr(device, "coords", (device.id,)) for device in devices)
        raise ValueError(
            f"No mesh of {'x'.join(map(str, shape))} places can be laid on these {len(devices)} "
            f"{devices[0].device_kind} devices, from {chips[0]} to {chips[-1]} of their torus; "
            "take all devices of a slice, or a block of them without holes, one device a chip"
        ) from error


def mesh_of(params: Any) -> Mesh | None:
    """The mesh over which parameters are sharded; None on one device or a mesh without `AXES`.

    Raises:
      ValueError: the mesh has explicit axes.
    """
    sharding = jax.tree.leaves(params)[0].sharding
    if not (isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)):
        return None
    if sharding.mesh.size == 1:
        return None
    refuse_explicit(sharding.mesh)
    return sharding.mesh if sharding.mesh.axis_names == AXES else None


def active_mesh() -> AbstractMesh | None:
    """The mesh of the surrounding `jax.set_mesh`, if it has the axes `AXES`.

    Returns:
      The mesh; None without such a mesh, on one device, and inside `shard_map`, where functions see
      their own device's shards.

    Raises:
      ValueError: if the mesh has explicit axes, as those of `jax.make_mesh` are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return None
    refuse_explicit(mesh)
    return mesh if mesh.size > 1 and mesh.axis_names == AXES else None


def no_mesh() -> Any:
    """A context in which modules run as plain code, on whichever devices their parameters are."""
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains the sharding of an activation, and on a TPU its memory layout to row-major.

    Args:
      x: activation.
      axes: logical names of its axes.
    """
    mesh = active_mesh()
    if mesh is None:
        return x
    spec = partition("An activation", axes, x.shape, mesh.shape)
    x = jax.lax.with_sharding_constraint(x, spec)
    if platform() != "tpu":
        return x
    # By default the TPU compiler keeps tokens innermost between layers, and transposes all
    # activations for the experts and back in each layer. Outside of `shard_map`, a layout
    # constraint would make it gather the array from all devices.
    row_major = functools.partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
    return jax.shard_map(row_major, in_specs=spec, out_specs=spec, check_vma=False)(x)


def all_gathered(param: nnx.Param, dtype: Any) -> jax.Array:
    """Casts a parameter and all-gathers it over the slicing axes; it stays split over `tensor`.

    Its gradient is reduce-scattered at the same place, so that neither whole parameters nor whole
    gradients of more than one layer exist at a time.

    Args:
      param: parameter with the names of its axes.
      dtype: dtype to cast to.
    """
    value, mesh = param[...].astype(dtype), active_mesh()
    if mesh is None:
        return value
    stored = partition("A parameter", param.axes, value.shape, mesh.shape)
    whole = partition("A parameter", param.axes, value.shape, {**mesh.shape, **_UNSLICED})
    return value if stored == whole else _gathered(value, stored, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, stored, whole):
    x = jax.lax.with_sharding_constraint(x, stored)  # so that the cast comes before the all-gather
    return jax.lax.with_sharding_constraint(x, whole)


_gathered.defvjp(
    lambda x, stored, whole: (_gathered(x, stored, whole), None),
    lambda stored, whole, _, grad: (jax.lax.with_sharding_constraint(grad, stored),),
)


def gather_slices(x: jax.Array, spec: PartitionSpec, *, keep: tuple[str, ...] = ()) -> jax.Array:
    """All-gathers an array over the slicing axes, inside `shard_map`.

    Args:
      x: this device's slice.
      spec: partition spec of the global array.
      keep: slicing axes over which the array stays split.
    """
    for dimension, axes in enumerate(spec):
        axes = tuple(a for a in _tuple(axes) if a in SLICES and a not in keep)
        if axes:
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x


def scatter_slices(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Reduce-scatters a gradient over the slicing axes; the transpose of `gather_slices`.

    Args:
      grad: this device's contribution to the gradient of the gathered array.
      spec: partition spec of the global array.
    """
    for dimension, axes in enumerate(spec):
        axes = tuple(a for a in _tuple(axes) if a in SLICES)
        if axes:
            grad = jax.lax.psum_scatter(grad, axes, scatter_dimension=dimension, tiled=True)
    return grad


def _tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


@jax.custom_vjp
def sum_columns(x: jax.Array) -> jax.Array:
    """Sums over `tensor` the contributions of each device's columns, inside `shard_map`.

    With `check_vma=False`, `shard_map` divides the gradient of its result equally among the devices
    of each axis that the result's spec does not mention. This function's backward pass restores the
    sum by a multiplication; the transpose of `psum` would communicate.
    """
    return jax.lax.psum(x, "tensor")


sum_columns.defvjp(
    lambda x: (sum_columns(x), None),
    lambda _, grad: (grad * jax.lax.axis_size("tensor"),),
)


def parameter_shardings(params: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
    """Determines the sharding of each parameter from the names of its axes.

    Raises:
      ValueError: if the mesh lacks one of `AXES` or has explicit axes, a parameter does not name
        its axes, or `partition` refuses one.
    """
    if not set(AXES) <= set(mesh.axis_names):
        raise ValueError(
            f"The mesh has the axes {', '.join(mesh.axis_names)}; expected {', '.join(AXES)}, as "
            "parallel.mesh.make_mesh makes them"
        )
    refuse_explicit(mesh)

    def placed(name: str, param: nnx.Variable) -> nnx.Variable:
        if "axes" not in param.get_metadata():
            raise ValueError(
                f"{name}: the parameter does not name its axes; declare it by "
                "model/layers.py: weight, or as nnx.Param(value, axes=(...))"
            )
        spec = partition(name, param.axes, param.shape, mesh.shape)
        return param.replace(NamedSharding(mesh, spec))

    return map_leaves(placed, params, is_variable)


def read_array(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding | None,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array of which each process reads its devices' blocks.

    Args:
      shape: the array's shape.
      sharding: its sharding. None: it is whole, on the default device, and not committed to it; a
        jitted step that takes it beside new arrays would otherwise be compiled again for its own
        results, which are committed as well.
      read: function that returns a block.
    """
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return read(index)

    return jax.make_array_from_callback(shape, sharding, block)


def partition(
    name: str, axes: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
    """Determines how an array is split over the mesh.

    Args:
      name: name of the array, for error messages.
      axes: logical names of its last dimensions; earlier dimensions, of stacked layers, are not
        split.
      shape: shape of the array.
      sizes: sizes of the mesh axes.

    Raises:
      ValueError: if the table does not have a name, or the mesh does not divide a dimension.
    """
    entries: list[Any] = [None] * (len(shape) - len(axes))
    taken: set[str] = set()
    for axis, size in zip(axes, shape[len(entries) :], strict=True):
        if axis not in TABLE:
            raise ValueError(f"{name}: the axis {axis!r} is not in parallel/mesh.py's TABLE")
        over = tuple(m for m in TABLE[axis] if m not in taken and sizes[m] > 1)
        ways = math.prod(sizes[m] for m in over)
        if axis in _WHOLE_IF_FEWER and ways % size == 0 and ways > size:
            over = ()
        elif size % ways:
            fitting = max(d for d in divisors(size) if d <= 2 * ways)
            raise ValueError(
                f"{name}: {axis}={size} is not divisible by the mesh's "
                f"{' x '.join(f'{m}={sizes[m]}' for m in over)}; make it a multiple of {ways}, or "
                f"those a divisor of it, such as {fitting}"
            )
        taken.update(over)
        entries.append(over[0] if len(over) == 1 else over or None)
    return PartitionSpec(*entries)
