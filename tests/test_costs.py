"""Parameters, operations, memory and step times by arithmetic, against counts of real programs."""

import dataclasses
import functools
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from oracles import RELEASED, abstract_model, small_config

from configs import tiny
from qwen3next_jax.config import ModelConfig, RunConfig
from qwen3next_jax.model import gated_attention, moe
from qwen3next_jax.model.cache import AttentionCache, DeltaCache, empty_cache
from qwen3next_jax.parallel import context
from qwen3next_jax.parallel.layout import check_fits
from qwen3next_jax.parallel.mesh import AXES, axis_sizes
from qwen3next_jax.plan import costs
from qwen3next_jax.plan.chips import CHIPS, parse_topology
from qwen3next_jax.plan.search import abstract_mesh, check_trains, rank
from qwen3next_jax.training.program import make_program
from qwen3next_jax.training.step import make_gradients

ROOT = pathlib.Path(__file__).parents[1]
ONE = dict.fromkeys(AXES, 1)


def run_config(name="tiny"):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    return RunConfig.from_dict(config.to_dict())


def test_parameters_are_those_of_the_released_model():
    config = ModelConfig.from_hf({**RELEASED, "mtp_steps": 1})
    parts = costs.parameters(nnx.state(abstract_model(config)))
    assert round(sum(parts.values()) / 1e9, 2) == 81.32
    assert round(parts["MTP"] / 1e9, 2) == 1.65
    assert parts["embedding"] == parts["head"] == 151936 * 2048
    assert parts["experts"] == 48 * 512 * 3 * 2048 * 512


@pytest.mark.parametrize("name", ["tiny", "1b_a100m", "80b_a3b", "80b_a3b_long", "qwen3_32b"])
def test_counts_of_parameters_and_state_are_those_of_eval_shape(name):
    config = run_config(name)
    program = make_program(config, abstract_mesh(ONE))
    model = nnx.state(abstract_model(config.model))
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(model))
    assert sum(costs.parameters(program.state.params).values()) == size
    laid_out = costs.weights(program.state.params, abstract_mesh(ONE))
    assert sum(p.own for p in laid_out) == size
    # Master copies and second moments are float32, first moments as the config says.
    width = 4 + 4 + jnp.dtype(config.precision.optimizer).itemsize
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    assert 0 <= state - width * size < 100  # counters


def test_a_split_model_lies_where_training_puts_it():
    config = run_config("80b_a3b")
    mesh = {**ONE, "fsdp": 4, "expert": 16}
    program = make_program(config, abstract_mesh(mesh))
    laid_out = costs.weights(program.state.params, abstract_mesh(mesh))
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(program.state.params)
    )
    assert sum(p.own * p.width for p in laid_out) == held


def test_forward_operations_are_the_published_arithmetic():
    config = ModelConfig.from_hf({**RELEASED, "mtp_steps": 1})
    for s in (4096, 262144):
        with_mtp = sum(costs.forward_flops(config, s).values())
        without = sum(costs.forward_flops(config, s, mtp=False).values())
        # docs/architecture.md gives three digits.
        assert with_mtp == pytest.approx(8.04e9 + 106496 * s, rel=1e-3)
        assert without == pytest.approx(7.28e9 + 98304 * s, rel=1e-3)


def even_loads(rows, weights, gate_up, down, group_sizes, **options):
    """The products of even loads and no more, where all of a compiler's ways on a CPU do more."""
    E, _, D, _ = gate_up.shape
    gate, up = jnp.einsum("erd,epdf->perf", rows.reshape(E, -1, D), gate_up)
    hidden = jax.nn.silu(gate) * up * weights.reshape(E, -1, 1)
    return jnp.einsum("erf,efd->erd", hidden, down).reshape(-1, D)


def with_reference(op):
    @functools.wraps(op)
    def reference(*args, implementation, **options):
        return op(*args, implementation="reference", **options)

    return reference


@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize(
    "kind", ["dense", "sparse", "hybrid", "frozen", "frozen layers", "frozen tied head"]
)
def test_executed_operations_are_the_compilers(kind, remat, monkeypatch):
    monkeypatch.setattr(gated_attention, "attention", with_reference(gated_attention.attention))
    monkeypatch.setattr(context, "gated_delta_rule", with_reference(context.gated_delta_rule))
    monkeypatch.setattr(moe, "expert_mlp", even_loads)
    monkeypatch.setattr(moe, "row_alignment", lambda *_, **sizes: 1)
    # The compiler counts a loop's body once.
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    T = 32
    given = tiny.get_config()
    given.model.update(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        intermediate_size=1024,
        full_attention_interval=1 if kind in ("dense", "sparse") else 2,
        mtp_steps=int(kind != "dense"),
    )
    if kind == "dense":
        given.model.update(num_experts=0, num_experts_per_tok=0)
    given.data.num_shards = 1
    # With 32 tokens a row, the 16 queries that are looked at for attention sinks would count.
    given.train.update(global_batch_size=2, sequence_length=T, loss_chunk=T, remat=remat)
    given.train.diagnostics = False
    if kind == "frozen":  # but for the lowest layer, so that all layers pass gradients on
        given.train.frozen_parameters = ("groups/layers/1/*", "*/down_proj", "mtp/fc", "lm_head")
    if kind == "frozen layers":
        given.train.frozen_parameters = ("groups/*", "embed_tokens", "mtp/fc")
    if kind == "frozen tied head":
        given.model.update(tie_word_embeddings=True, mtp_steps=2)
        given.train.frozen_parameters = ("embed_tokens", "mtp/*proj")
    config = RunConfig.from_dict(given.to_dict())
    program = make_program(config, abstract_mesh(ONE))

    def bare(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    params, batch = jax.tree.map(bare, (program.state.params, program.batch))
    lowered = jax.jit(make_gradients(program.graph, config)).lower(params, batch)
    counted = lowered.cost_analysis()["flops"]
    if kind == "dense":  # compilation of the others would take minutes
        assert lowered.compile().cost_analysis()["flops"] == pytest.approx(counted, rel=0.01)
    weights = costs.weights(params, abstract_mesh(ONE), config.train.frozen_parameters)
    executed = functools.partial(costs.executed_flops, config.model, T, remat=remat, seen=1.0)
    assert (executed(params=weights) < executed()) == kind.startswith("frozen")
    ours = 2 * T * executed(params=weights)
    # The compiler counts norms, gates and softmaxes too, about 1 in the model dimension.
    assert counted == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize(
    ("name", "topology"),
    [("80b_a3b", "v5p:4x4x4"), ("80b_a3b", "v6e:16x16")],
)
def test_by_arithmetic_the_80b_config_fits_its_machines(name, topology):
    config = run_config(name)
    chip, places = parse_topology(topology)
    mesh = axis_sizes(config.mesh, places)
    program = make_program(config, abstract_mesh(mesh))  # refuses what the mesh cannot divide
    laid_out = costs.weights(program.state.params, abstract_mesh(mesh))
    assert sum(costs.memory(config, laid_out, mesh, optimizer_width=6.0).values()) < chip.hbm


def test_ranking_prefers_what_fits_and_is_fast():
    config = run_config("80b_a3b")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, global_batch_size=256)
    )
    program = make_program(config, abstract_mesh(ONE))
    given = dict(optimizer_width=6.0)
    found = rank(config, program.state, CHIPS["v5p"], 64, **given)
    assert any(layout.mesh["expert"] == 64 for layout in found)  # as the config has it
    assert all(math.prod(layout.mesh.values()) == 64 for layout in found)
    assert all(layout.memory_bytes <= CHIPS["v5p"].hbm for layout in found)
    for layout in found:
        check_fits(layout.config, layout.mesh)  # training will take it
    times = [sum(layout.step_seconds) for layout in found]
    assert times == sorted(times)
    assert not rank(config, program.state, CHIPS["v5e"], 16, **given)  # 0.8 TB of state


def test_ranking_leaves_out_meshes_on_which_too_much_is_whole():
    config = run_config("qwen3_32b")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, global_batch_size=64)
    )
    # Nor does it stop at meshes whose slices do not divide `data`.
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, num_slices=2))
    state = make_program(config, abstract_mesh(ONE)).state
    with pytest.raises(ValueError, match=r"more than mesh\.max_replicated=0\.02"):
        check_trains(config, state, {**ONE, "fsdp": 4, "tensor": 16})  # 8 KV heads
    found = rank(config, state, CHIPS["v5p"], 64, optimizer_width=6.0)
    assert found
    assert all(layout.mesh["tensor"] < 16 for layout in found)
    assert all(layout.mesh["data"] % 2 == 0 for layout in found)


def test_a_dense_layers_matrices_are_no_experts():
    config = small_config(mlp_only_layers=(0,), intermediate_size=16)
    model, c = nnx.state(abstract_model(config)), config
    parts = costs.parameters(model)
    D, dense = c.hidden_size, 3 * c.hidden_size * 16
    experts = 3 * D * c.moe_intermediate_size * c.num_experts * (c.num_hidden_layers - 1)
    assert (parts["feed-forward"], parts["experts"]) == (dense, experts)
    rest = sum(parts.values()) - parts["embedding"] - experts
    chosen = experts * c.num_experts_per_tok // c.num_experts
    assert costs.active_parameters(model, c) == rest + D + chosen
    # A tied embedding is the head too, which every token meets whole.
    tied = small_config(tie_word_embeddings=True)
    apart = small_config(tie_word_embeddings=False)
    active = [costs.active_parameters(nnx.state(abstract_model(c)), c) for c in (tied, apart)]
    assert active[1] - active[0] == tied.hidden_size  # a row of the other embedding
    # In a model without experts, an axis for them slices as fsdp does.
    config = run_config("qwen3_32b")
    params = make_program(config, abstract_mesh(ONE)).state.params
    sent = []
    for axis in ("fsdp", "expert"):
        mesh = {**ONE, axis: 64}
        sent.append(costs.communication(config, costs.weights(params, abstract_mesh(mesh)), mesh))
    del sent[1]["tokens to experts and back"]
    assert sent[0] == sent[1]


def test_what_is_frozen_has_no_gradients_moments_nor_traffic_of_them():
    c = run_config("80b_a3b")
    experts = dict(frozen_parameters=("*/mlp/gate_up_proj", "*/mlp/down_proj"))
    frozen = dataclasses.replace(c, train=dataclasses.replace(c.train, **experts))
    state = make_program(c, abstract_mesh(ONE)).state
    mesh = {**ONE, "data": 2, "fsdp": 32}
    laid_out = [
        costs.weights(state.params, abstract_mesh(mesh), of.train.frozen_parameters)
        for of in (c, frozen)
    ]
    trained = [sum(p.own for p in weights if not p.frozen) for weights in laid_out]
    assert 0 < trained[1] < 0.1 * trained[0]
    held, sent, seconds = (
        [function(of, weights) for of, weights in zip((c, frozen), laid_out, strict=True)]
        for function in (
            lambda of, weights: costs.memory(of, weights, mesh, optimizer_width=6.0),
            lambda of, weights: costs.communication(of, weights, mesh),
            lambda of, weights: costs.step_seconds(of, weights, mesh, CHIPS["v5p"]),
        )
    )
    for part, entries in (("optimizer state", 6.0), ("gradients", 4.0)):
        assert [x[part] for x in held] == [entries * n for n in trained]
    assert sent[0]["parameters gathered"] == sent[1]["parameters gathered"]
    for part in ("gradients scattered", "gradients over data"):
        assert sent[1][part] < 0.1 * sent[0][part]
    # Gradients of experts are a third of their operations, and nothing of an update is left.
    rest = [x[0] for x in seconds]
    assert 0.5 * rest[0] < rest[1] < 0.9 * rest[0]
    fitting = [rank(of, state, CHIPS["v5p"], 16, optimizer_width=6.0) for of in (c, frozen)]
    assert fitting[1]
    assert not fitting[0]


def test_frozen_parameters_are_copied_for_products_only_beside_those_of_equal_layers():
    c = run_config("80b_a3b")
    frozen = dict(frozen_parameters=("groups/*/mlp/down_proj",), remat="layer")
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, **frozen))
    c = dataclasses.replace(c, precision=dataclasses.replace(c.precision, frozen="bfloat16"))
    params = make_program(c, abstract_mesh(ONE)).state.params
    weights = costs.weights(params, abstract_mesh(ONE), c.train.frozen_parameters)
    down = [p for p in weights if p.frozen]
    assert len(down) == 4
    rest = sum(p.own for p in weights if not p.frozen)
    for remat, copied in (("layer", down[:3]), ("none", [])):  # the fourth has no equal neighbour
        c = dataclasses.replace(c, train=dataclasses.replace(c.train, remat=remat))
        held = costs.memory(c, weights, ONE, optimizer_width=6.0)
        assert held["parameters to multiply with"] == 2 * (rest + sum(p.own for p in copied))


def test_a_frozen_head_has_no_gradient_and_frozen_layers_keep_nothing():
    c = run_config("80b_a3b")
    # With all logits at once, the head is where most memory is held.
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, loss_chunk=4096))
    params = make_program(c, abstract_mesh(ONE)).state.params
    held = []
    for globs in (("groups/*", "embed_tokens"), ("groups/*", "embed_tokens", "lm_head")):
        weights = costs.weights(params, abstract_mesh(ONE), globs)
        held.append(costs.memory(c, weights, ONE, optimizer_width=6.0))
        assert held[-1]["kept activations"] == 0
    vocabulary = c.model.vocab_size * c.model.hidden_size
    assert held[0]["the head"] - held[1]["the head"] == 2 * 8 * vocabulary


def test_the_yardstick_is_the_model_of_its_config():
    assert ModelConfig.from_hf(costs.YARDSTICK) == run_config("qwen3_32b").model


def test_serving_takes_what_the_caches_of_a_bfloat16_model_hold(monkeypatch):
    monkeypatch.setattr("qwen3next_jax.ops.cpu.platform", lambda: "tpu")
    config = small_config()
    caches = [empty_cache(config, m, batch=1, slots=128, dtype=jnp.bfloat16) for m in config.mixers]
    per_token, states = costs.serving_bytes(config)
    attention = [c for c in caches if isinstance(c, AttentionCache)]
    delta = [c.state for c in caches if isinstance(c, DeltaCache)]
    assert per_token * 128 == sum(x.size * x.dtype.itemsize for c in attention for x in c)
    assert states == sum(x.size * x.dtype.itemsize for x in delta)


def test_a_sum_of_gradients_is_held_beside_a_micro_batchs():
    config = run_config("80b_a3b")
    accumulated = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            global_batch_size=4 * config.train.global_batch_size,
            gradient_accumulation_steps=4,
        ),
    )
    mesh = {**ONE, "expert": 64}
    params = make_program(config, abstract_mesh(ONE)).state.params
    laid_out = costs.weights(params, abstract_mesh(mesh))
    at_once, summed = (
        sum(costs.memory(c, laid_out, mesh, optimizer_width=6.0).values())
        for c in (config, accumulated)
    )
    assert summed - at_once == 4.0 * sum(p.own for p in laid_out)


def test_the_scores_that_attention_keeps_are_not_executed_again():
    config = run_config("80b_a3b").model
    again, kept = (
        costs.executed_flops(config, 4096, remat=remat)
        for remat in ("layer", "layer_but_attention")
    )
    assert again - kept == costs.forward_flops(config, 4096)["attention scores"]


@pytest.fixture(scope="module")
def the_80b():
    """Its config, and how its weights lie on a mesh of given axes."""
    config = run_config("80b_a3b")
    params = make_program(config, abstract_mesh(ONE)).state.params

    def laid_out(**axes):
        return costs.weights(params, abstract_mesh({**ONE, **axes})), {**ONE, **axes}

    return config, laid_out


def with_changes(config, part, **changes):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("layer", 2)])
def test_recomputation_gathers_the_layers_parameters_a_second_time(remat, times, the_80b):
    config, laid_out = the_80b
    weights, mesh = laid_out(fsdp=8)
    sent = costs.communication(with_changes(config, "train", remat=remat), weights, mesh)
    split = [p for p in weights if p.own < p.size]
    layers = sum(p.size for p in split if p.name.startswith("groups/"))
    others = sum(p.size for p in split) - layers
    micro_batches = config.train.gradient_accumulation_steps
    assert sent["parameters gathered"] == micro_batches * 2 * (times * layers + others)  # bfloat16


def test_devices_along_tensor_divide_the_products(the_80b):
    config, laid_out = the_80b
    free = dict(hbm_bandwidth=1e30, ici_bandwidth=1e30)  # so that nothing else takes time
    chip = dataclasses.replace(CHIPS["v5p"], **free)
    one, two = (
        costs.step_seconds(config, *laid_out(**axes), chip)[0] for axes in ({}, {"tensor": 2})
    )
    assert one == pytest.approx(2 * two)


def test_a_buffer_without_a_factor_takes_the_rows_of_all_devices(the_80b):
    config, laid_out = the_80b
    weights, mesh = laid_out(expert=8)
    held = [
        costs.memory(
            with_changes(config, "mesh", moe_buffer_factor=factor),
            weights,
            mesh,
            optimizer_width=6.0,
        )
        for factor in (-1.0, 8.0, 1.0)
    ]
    assert held[0] == held[1] != held[2]


def test_the_head_holds_logits_and_their_gradients_in_float32():
    # A vocabulary so large that a step needs the most memory at the head.
    config = with_changes(run_config(), "model", vocab_size=10**6)
    params = make_program(config, abstract_mesh(ONE)).state.params
    weights = costs.weights(params, abstract_mesh(ONE))
    short, long = (
        costs.memory(
            with_changes(config, "train", loss_chunk=chunk), weights, ONE, optimizer_width=8.0
        )["the head"]
        for chunk in (16, 32)
    )
    rows = config.train.micro_batch_size
    assert long - short == rows * 16 * (4 + 4) * 10**6


def test_small_config_has_a_part_for_every_parameter():
    for config in (
        small_config(mtp_steps=1),
        small_config(mlp_only_layers=(0,), intermediate_size=16),
    ):
        model = nnx.state(abstract_model(config))
        assert sum(costs.parameters(model).values()) == sum(x.size for x in jax.tree.leaves(model))
