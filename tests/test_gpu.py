"""What a GPU would run, as far as it can be told without one: everything lowers for CUDA."""

import functools

import jax
import jax.numpy as jnp
import oracles
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from small_run import small_config

from qwen3next_jax.config import FULL
from qwen3next_jax.inference import decode
from qwen3next_jax.inference.sampling import Sampling
from qwen3next_jax.model import moe
from qwen3next_jax.model.cache import empty_cache
from qwen3next_jax.ops.expert_mlp import default_implementation
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.parallel.context import implementations
from qwen3next_jax.parallel.mesh import AXES
from qwen3next_jax.training.program import make_program, new_model

BFLOAT16 = dict(precision__compute="bfloat16", precision__optimizer="bfloat16")


def gpus(sizes, names):
    """A mesh of devices that are not here; under it operations are traced for them."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    types = (AxisType.Auto,) * len(names)
    return AbstractMesh(tuple(sizes), names, axis_types=types, abstract_device=device)


def lowered(mesh, function, *args, **options):
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "gpu"
        return function.trace(*args, **options).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({}, {}),
        (
            dict(context=2),
            dict(train__sequence_length=128, train__remat="layer_but_attention", **BFLOAT16),
        ),
    ],
)
def test_train_step_lowers_for_cuda(mesh, changes):
    sizes = {**dict.fromkeys(AXES, 1), **mesh}
    config = small_config("unread", **{f"mesh__{axis}": n for axis, n in sizes.items()}, **changes)
    mesh = gpus(sizes.values(), AXES)
    program = make_program(config, mesh)
    text = lowered(mesh, program.step, program.state, program.batch)
    # Which XLA expands there to all rows times all experts.
    assert "chlo.ragged_dot" not in text


@pytest.mark.parametrize(
    ("mesh", "rows", "expected"),
    [
        ({}, 8, "products"),
        (dict(tensor=2), 8, "blocked"),  # 128 columns, fewer than a kernel takes
        ({}, 1, "blocked"),  # 64 rows for an expert, fewer than a kernel takes
        (dict(expert=2), 2, "products"),
        (dict(context=2), 2, "blocked"),
    ],
)
def test_the_named_implementation_of_experts_is_the_one_that_runs(
    mesh, rows, expected, monkeypatch
):
    config = oracles.small_config(
        hidden_size=256, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2
    )
    sizes = {**dict.fromkeys(AXES, 1), **mesh}
    mesh = gpus(sizes.values(), AXES)
    taken = []
    monkeypatch.setattr(
        moe,
        "expert_mlp",
        lambda rows, weights, gate_up, down, sizes, *, block, expected_rows: (
            taken.append(default_implementation(rows.shape[1], down.shape[1], rows.dtype, block)),
            rows,
        )[1],
    )
    layer = nnx.eval_shape(lambda: moe.SparseMoE(config, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((rows, 128, 256), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        nnx.eval_shape(lambda layer, x: layer(x), layer, x)
        named = implementations(config, mesh, rows=rows, tokens=128, dtype=x.dtype)
    assert (taken, named["experts"]) == ([expected], expected)


def test_train_step_of_large_heads_takes_the_kernels_for_hopper_gpus():
    sizes = {**dict.fromkeys(AXES, 1), "fsdp": 2, "expert": 2}
    config = small_config(
        "unread",
        train__sequence_length=128,
        model__hidden_size=256,
        model__head_dim=128,
        model__linear_key_head_dim=128,
        model__linear_value_head_dim=128,
        model__moe_intermediate_size=256,
        model__mtp_steps=0,
        **BFLOAT16,
        **{f"mesh__{axis}": n for axis, n in sizes.items()},
    )
    program = make_program(config, gpus(sizes.values(), AXES))
    text = lowered(gpus(sizes.values(), AXES), program.step, program.state, program.batch)
    kernels = "_product_kernel", "_outer_kernel", "_forward_kernel", "_backward_chunk_kernel"
    assert all(kernel in text for kernel in (*kernels, "ragged_all_to_all"))


def test_speculative_generation_lowers_for_cuda():
    config = small_config("unread", **BFLOAT16)
    model = nnx.eval_shape(lambda: new_model(config).unstacked())
    graph, params = nnx.split(model)
    structure = decode._Structure(graph)
    rules = decode._Rules(Sampling(temperature=0.7, top_p=0.9), drafts=2, stop_tokens=(3,))
    mesh, B = gpus([1], ("chip",)), 2

    def caches():
        mtp_cache = empty_cache(model.config, FULL, batch=B, slots=128, dtype=model.dtype)
        return model.empty_cache(batch=B, slots=128), mtp_cache

    hidden = jax.ShapeDtypeStruct((B, model.config.hidden_size), model.dtype)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    rows = ints((B,))
    with jax.sharding.use_abstract_mesh(mesh):
        prompts = (params, jax.eval_shape(caches), hidden)
    assert prompts[1][1].k.dtype == jnp.bfloat16
    prefill = decode._prefill(model.dtype)
    lowered(mesh, prefill, structure, *prompts, ints((B, 17)), first=rows, length=rows)
    rest = dict(length=rows, seen=None, budget=rows, key=jax.random.key(0))
    lowered(mesh, decode._begin, structure, rules, *prompts, **rest)
    with jax.sharding.use_abstract_mesh(mesh):
        begin = functools.partial(decode._begin, structure, rules)
        state, _ = jax.eval_shape(begin, *prompts, **rest)
    text = lowered(mesh, decode._run, structure, rules, params, state, ints(()))
    assert "chlo.ragged_dot" not in text
