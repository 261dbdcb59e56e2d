"""Meshes, and the table that shards parameters over them."""

import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import abstract_model, small_config

from qwen3next_jax.config import MeshConfig
from qwen3next_jax.parallel.mesh import (
    AXES,
    BATCH,
    active_mesh,
    axis_sizes,
    fsdp_mesh,
    make_mesh,
    parameter_shardings,
    partition,
)
from qwen3next_jax.parallel.processes import BatchShare
from qwen3next_jax.parallel.vocabulary import embed
from qwen3next_jax.plan import tpu

EIGHT_WAYS = dict(data=1, fsdp=8, expert=1, context=1, tensor=1)


def specs(config):
    found = {}
    for path, param in nnx.to_flat_state(nnx.state(abstract_model(config))):
        name = "/".join(map(str, path))
        found[name] = partition(name, param.axes, param.shape, EIGHT_WAYS)
    return found


def test_matrices_are_split_along_the_model_dimension_and_vectors_are_not():
    found = specs(small_config(mtp_steps=1))
    assert found["embed_tokens"] == P(None, "fsdp")
    assert found["groups/layers/0/mlp/gate_up_proj"] == P(None, None, None, "fsdp", None)
    assert found["groups/layers/1/self_attn/o_proj"] == P(None, None, None, "fsdp")
    assert found["mtp/fc"] == P(None, "fsdp", None)  # square: along its first dimension only
    assert found["norm/weight"] == P(None)
    whole = [name for name, spec in found.items() if "fsdp" not in spec]
    small = ("norm", "conv", "A_log", "dt_bias")
    assert all(any(part in name for part in small) for name in whole), whole


def test_a_dimension_that_does_not_divide_is_refused_with_a_choice():
    with pytest.raises(
        ValueError, match=r"embed=36 is not divisible by the mesh's fsdp=8.*multiple of 8, .*as 12"
    ):
        specs(small_config(hidden_size=36))


def test_key_and_value_heads_are_whole_only_where_devices_are_a_multiple_of_them():
    def heads(number):
        return partition("k_proj", ("kv_heads",), (number,), {**EIGHT_WAYS, "tensor": 4})

    assert heads(4) == heads(8) == P("tensor")
    assert heads(1) == heads(2) == P(None)
    with pytest.raises(ValueError, match=r"kv_heads=3 is not divisible by the mesh's tensor=4"):
        heads(3)


@pytest.mark.parametrize(
    ("sizes", "axes"), [((8, 1, 1, 1, 1), AXES), ((8,), ("mine",)), ((1,), ("mine",))]
)
def test_a_mesh_of_explicit_axes_is_refused_with_what_to_take(sizes, axes):
    explicit = jax.sharding.AbstractMesh(
        sizes, axes, axis_types=(jax.sharding.AxisType.Explicit,) * len(axes)
    )
    named = rf"axes {axes[0]}.* are explicit; make it by .*make_mesh.* \* {len(axes)}"
    with jax.sharding.use_abstract_mesh(explicit), pytest.raises(ValueError, match=named):
        active_mesh()
    params = nnx.state(abstract_model(small_config()))
    if axes != AXES:
        named = r"has the axes mine; expected data, fsdp, .*make_mesh"
    with pytest.raises(ValueError, match=named):
        parameter_shardings(params, explicit)


def test_an_unknown_axis_name_is_refused():
    with pytest.raises(ValueError, match="gate: the axis 'gatez' is not in"):
        partition("gate", ("gatez",), (4,), EIGHT_WAYS)


def test_a_parameter_that_names_no_axes_is_refused_by_name():
    params = nnx.state(nnx.List([nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))]))
    with pytest.raises(ValueError, match=r"^0/kernel: .* does not name its axes; declare it by"):
        parameter_shardings(params, make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1]))


def test_an_axis_takes_what_is_left_and_a_mesh_of_the_wrong_size_is_refused():
    devices = jax.devices()[:1]
    sizes = dict(make_mesh(MeshConfig(data=-1, fsdp=1), devices).shape)
    assert sizes == dict(data=1, fsdp=1, expert=1, context=1, tensor=1)
    with pytest.raises(ValueError, match=r"mesh\.data and mesh\.expert are all -1; only one axis"):
        axis_sizes(MeshConfig(data=-1, fsdp=2, expert=-1), 8)
    with pytest.raises(ValueError, match=r"has 6 places for 1 devices; set one of mesh\.data"):
        make_mesh(MeshConfig(data=2, fsdp=3), devices)
    with pytest.raises(
        ValueError, match=r"mesh\.fsdp=0 must be at least 1, or -1 for what is left"
    ):
        make_mesh(MeshConfig(data=1, fsdp=0), devices)

    with pytest.raises(ValueError, match=r"8 devices are not divisible by mesh\.fsdp=3; 2 or 4 in"):
        axis_sizes(MeshConfig(data=-1, fsdp=3), 8)
    with pytest.raises(ValueError, match=r"1 devices are not divisible by mesh\.fsdp=2; 1 in all"):
        axis_sizes(MeshConfig(data=-1, fsdp=2), 1)


def test_a_command_s_mesh_is_of_all_devices_along_fsdp():
    assert fsdp_mesh(None) is None
    devices = jax.device_count()
    assert fsdp_mesh(-1).shape == fsdp_mesh(devices).shape == {**EIGHT_WAYS, "fsdp": devices}
    with pytest.raises(ValueError, match=rf"--mesh_fsdp=3: there are {devices} devices; give"):
        fsdp_mesh(3)


def test_slices_that_do_not_divide_data_are_refused_without_devices():
    assert axis_sizes(MeshConfig(data=4, fsdp=1, num_slices=2), 4)["data"] == 4
    assert axis_sizes(MeshConfig(data=1, fsdp=4, num_slices=-1), 4)["data"] == 1
    with pytest.raises(ValueError, match=r"mesh\.data=1 .*num_slices=2; .*: make it 2 or a multi"):
        axis_sizes(MeshConfig(data=1, fsdp=4, num_slices=2), 4)
    with pytest.raises(ValueError, match=r"mesh\.data=4 .*=3; .*: 4 devices make 2 or 4 of one"):
        axis_sizes(MeshConfig(data=4, fsdp=1, num_slices=3), 4)
    with pytest.raises(ValueError, match=r"mesh\.data=1 is not divisible by mesh\.num_slices=2"):
        make_mesh(MeshConfig(data=1, fsdp=-1, num_slices=2), [gpu(number) for number in range(16)])


def gpu(number):
    """One of eight on each host, as JAX numbers them."""
    return mock.Mock(
        jax.Device,
        id=number,
        platform="gpu",
        device_kind="gpu",
        process_index=number // 8,
        slice_index=number // 8,
    )


@pytest.mark.parametrize(("slices", "data"), [(1, 1), (2, 2), (-1, 1)])
def test_hosts_of_gpus_are_slices_only_where_the_config_says_so(slices, data):
    gpus = [gpu(number) for number in range(16)]
    mesh = make_mesh(MeshConfig(data=data, fsdp=-1, num_slices=slices), gpus)
    assert mesh.shape["fsdp"] == 16 // data
    assert [gpu.id for gpu in mesh.devices.flat] == list(range(16))


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8", "v5p:2x2x3"])
def test_every_mesh_lies_on_a_torus_and_gives_processes_whole_rows(topology):
    devices = tpu.devices(topology)
    divisors = [d for d in range(1, len(devices) + 1) if len(devices) % d == 0]
    shapes = itertools.product(divisors, repeat=len(AXES))
    for sizes in (s for s in shapes if math.prod(s) == len(devices)):
        mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))), devices)
        assert mesh.devices.shape == sizes
        assert set(mesh.devices.flat) == set(devices)
        rows = math.prod(sizes[:3])
        BatchShare(NamedSharding(mesh, BATCH), (rows, 64 * sizes[3]))  # raises if they are not


def test_the_axis_that_talks_most_is_on_neighbouring_chips():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, expert=8), tpu.devices("v6e:8x8"))
    rings = mesh.devices.reshape(8, 8)
    assert all(len({d.coords[1] for d in ring}) == 1 for ring in rings) or (
        all(len({d.coords[0] for d in ring}) == 1 for ring in rings)
    )


def test_a_part_of_a_torus_with_holes_is_refused_and_says_what_to_take():
    devices = tpu.devices("v5p:4x4x4")
    assert make_mesh(MeshConfig(data=1, fsdp=-1), devices[:32]).size == 32  # half of it, whole
    with pytest.raises(ValueError, match=r"on these 24 TPU v5 devices.*block of them without"):
        make_mesh(MeshConfig(data=1, fsdp=-1), devices[:24])


def test_every_parameter_gets_a_sharding():
    params = nnx.state(abstract_model(small_config(mtp_steps=1)))
    shardings = parameter_shardings(
        params, make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    )
    assert len(jax.tree.leaves(shardings)) == len(jax.tree.leaves(params))


def test_gradients_of_a_bfloat16_embedding_are_summed_over_data_in_float32():
    auto = (jax.sharding.AxisType.Auto,) * 5
    mesh = jax.sharding.AbstractMesh((8, 1, 1, 1, 1), AXES, axis_types=auto)
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    table = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)

    def total(table, tokens):
        return embed(tokens, table, dtype=jnp.dtype("bfloat16")).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(jax.grad(total))(table, tokens)
    *_, backward = [e for e in program.eqns if e.primitive.name == "shard_map"]
    assert [x.aval.dtype for x in backward.outvars if x.aval.shape == table.shape] == [jnp.float32]
