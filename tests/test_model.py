"""The whole model: its size, switches and dtypes, and what rematerialisation may not change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from launched import run_python
from oracles import (
    RELEASED,
    abstract_model,
    quick_jit,
    random_model,
    random_module,
    relative_error,
    small_config,
)
from small_run import small_config as small_run_config
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import qwen3next_jax as q3n
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.parallel.vocabulary import embed
from qwen3next_jax.training.loss import complete_batch
from qwen3next_jax.training.program import new_model


def sizes(model):
    """Number of parameters by path."""
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): int(np.prod(p.shape)) for path, p in params}


@functools.cache
def released_sizes(mtp_steps):
    return sizes(abstract_model(ModelConfig.from_hf({**RELEASED, "mtp_steps": mtp_steps})))


def test_the_released_model_has_exactly_the_parameters_that_transformers_counts():
    with torch.device("meta"):
        theirs = Qwen3NextForCausalLM(Qwen3NextConfig(**RELEASED))
    total = sum(p.numel() for p in theirs.parameters())
    assert total == 79_674_391_296
    assert sum(released_sizes(0).values()) == total


def test_the_released_model_with_mtp_has_the_published_sizes():
    sizes = released_sizes(1)
    main = {path: n for path, n in sizes.items() if not path.startswith("mtp/")}
    assert main == released_sizes(0)
    mtp, total = sum(sizes.values()) - sum(main.values()), sum(sizes.values())
    assert round(mtp / 1e9, 2) == 1.65
    assert round(total / 1e9, 2) == 81.32
    inner = sum(n for path, n in main.items() if path not in ("embed_tokens", "lm_head"))
    assert round(inner / 1e9, 2) == 79.05
    experts = sum(
        n
        for path, n in main.items()
        if path.split("/")[-2:][0] == "mlp" and path.endswith(("mlp/gate_up_proj", "mlp/down_proj"))
    )
    assert round((inner - experts * 502 / 512) / 1e9, 2) == 3.25


def test_initial_values_are_the_published_ones_and_each_layer_draws_its_own():
    config = small_config(num_hidden_layers=4, hidden_size=64, linear_num_value_heads=32)
    # This generator compiles to one instruction a draw; the default one to hundreds.
    key = jax.random.key(0, impl="rbg")
    params = quick_jit(lambda key: nnx.state(q3n.Qwen3Next(config, rngs=nnx.Rngs(key))))(key)
    for path, param in nnx.to_flat_state(params):
        name, value = "/".join(map(str, path)), np.asarray(param[...])
        if name.endswith("A_log"):
            assert (np.exp(value) > 0.01).all()
            assert (np.exp(value) < 16).all()
            assert np.ptp(np.exp(value)) > 8
        elif name.endswith(("dt_bias", "linear_attn/norm/weight")):
            assert (value == 1).all(), name
        elif "norm" in name:
            assert (value == 0).all(), name
        else:
            # The standard deviation of n numbers is known to a share of 1 / √(2n).
            assert abs(value.std() / 0.02 - 1) < 5 / np.sqrt(2 * value.size), name
            assert abs(value.mean()) < 5 * 0.02 / np.sqrt(value.size), name
            if path[0] == "groups":
                assert (value[0] != value[1]).all(), name
        if path[-1] == "router":
            np.testing.assert_allclose(np.linalg.norm(value, axis=1), 0.02 * 64**0.5, rtol=1e-5)


def test_a_run_s_model_has_its_config_s_rematerialisation_and_room_for_experts():
    changes = dict(train__remat="layer_but_attention", mesh__moe_buffer_factor=2.0)
    model = nnx.eval_shape(lambda: new_model(small_run_config("unread", **changes)))
    assert model.remat == "layer_but_attention"
    assert [layer.mlp.moe_buffer_factor for layer in model.groups.layers] == [2.0, 2.0]
    assert model.mtp.layer.mlp.moe_buffer_factor == 2.0


@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
def test_a_run_s_model_has_its_config_s_dtypes(parameters):
    changes = dict(precision__parameters=parameters, precision__compute="bfloat16")
    model = nnx.eval_shape(lambda: new_model(small_run_config("unread", **changes)))
    assert (model.embed_tokens.dtype.name, model.dtype.name) == (parameters, "bfloat16")


def test_a_run_s_seed_draws_its_weights():
    def table(seed):
        config = small_run_config("unread", train__seed=seed)
        return quick_jit(lambda: new_model(config).embed_tokens[...])()

    assert (table(0) != table(1)).all()


@functools.cache
def gradients(**options):
    """Loss and gradients of one batch, for a model with the same weights whatever the options."""
    graph, params = nnx.split(random_model(small_config(), **options))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 70), dtype=np.int32)
    batch = complete_batch(jnp.asarray(tokens))

    def value(params, batch):
        return q3n.loss(nnx.merge(graph, params), batch)[0]

    return quick_jit(jax.value_and_grad(value))(params, batch)


@pytest.mark.parametrize("remat", ["layer", "layer_but_attention"])
def test_rematerialisation_changes_neither_loss_nor_gradients(remat):
    (plain, grads), (again, theirs) = gradients(), gradients(remat=remat)
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    # The same operations, which the compiler may fuse in another way.
    floor = 1e-3 * np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    errors = jax.tree.map(lambda a, b: relative_error(a, b, floor), theirs, grads)
    assert max(jax.tree.leaves(errors)) < 1e-5
    with pytest.raises(ValueError, match="'all' is unknown; expected one of none, layer"):
        abstract_model(small_config(), remat="all")


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_a_model_with_layers_in_arrays_of_their_own_is_the_same_model(remat):
    model = random_model(small_config(num_hidden_layers=8), remat=remat)  # two groups

    def run(graph, params, tokens):
        def loss(params):
            observed = {}
            hidden, stats = nnx.merge(graph, params).hidden_states(tokens, observed=observed)
            return hidden.sum(), (hidden, stats, observed)

        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return aux, grads

    def results(model):
        graph, params = nnx.split(model)
        return quick_jit(functools.partial(run, graph))(params, jnp.arange(60).reshape(2, 30))

    want, stacked = results(model)
    got, grads = results(model.unstacked())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for i in range(2):
        of_group = jax.tree.map(lambda p, i=i: p[i], stacked.groups)
        for a, b in zip(jax.tree.leaves(grads.groups[i]), jax.tree.leaves(of_group), strict=True):
            assert relative_error(a, b) < 1e-4


def test_rematerialisation_keeps_no_copies_of_parameters():
    config = small_config(num_hidden_layers=20, full_attention_interval=4)
    groups = config.num_hidden_layers // len(config.group)
    graph, params = nnx.split(abstract_model(config, remat="layer"))

    def loss(params, tokens):
        return nnx.merge(graph, params).hidden_states(tokens)[0].sum()

    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr
    forward = next(
        eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == groups
    )
    kept = [x.aval.shape for x in forward.outvars if x.aval.shape[:1] == (groups,)]
    assert (groups, 3, 1, 16, config.hidden_size) in kept  # the inputs of neighbouring layers
    matrices = {p.shape[1:] for p in jax.tree.leaves(params["groups"]) if p.ndim > 2}
    assert not [shape for shape in kept if shape[1:] in matrices or shape[2:] in matrices]


def test_bfloat16_compute_keeps_the_direction_of_the_gradients_of_the_gates():
    (_, wanted), (_, got) = gradients(), gradients(dtype=jnp.bfloat16)
    wanted, got = dict(nnx.to_flat_state(wanted)), dict(nnx.to_flat_state(got))
    checked = 0
    for path, a in wanted.items():
        if path[-1] in ("A_log", "dt_bias"):
            a, b = np.ravel(a[...]), np.ravel(got[path][...])
            assert b.dtype == np.float32
            assert a @ b >= 0.99 * np.linalg.norm(a) * np.linalg.norm(b), path
            checked += 1
    assert checked == 2


def test_a_token_that_comes_often_counts_every_time():
    table = jnp.zeros((8, 4), jnp.bfloat16)
    tokens = jnp.full((1, 4096), 3)

    def total(table):
        return embed(tokens, table, dtype=jnp.dtype(jnp.bfloat16)).astype(jnp.float32).sum()

    # Summed in bfloat16 it would stay at 256.
    np.testing.assert_array_equal(jax.grad(total)(table)[3], 4096)


@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("changed", [(1,), (0, 1)])
def test_a_module_in_place_of_another_is_the_one_that_runs(changed, remat):
    class Halved(q3n.GatedDeltaNet):
        def __call__(self, x, **given):
            return super().__call__(x, **given) / 2

    config = small_config(num_hidden_layers=4, full_attention_interval=4)
    model, want = random_model(config, remat=remat), random_model(config, remat=remat)
    for i in changed:
        mixer = model.groups.layers[i].linear_attn
        # In place of the stacked one, with its parameters.
        _, params = nnx.split(mixer)
        graph = nnx.graphdef(nnx.eval_shape(lambda: Halved(config, rngs=nnx.Rngs(0))))
        model.groups.layers[i].linear_attn = nnx.merge(graph, params)
        out = want.groups.layers[i].linear_attn.out_proj
        out[...] = out[...] / 2
    tokens = jnp.arange(12)[None]
    np.testing.assert_allclose(model(tokens), want(tokens), atol=1e-5)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", [q3n.GatedDeltaNet, q3n.GatedAttention, q3n.SparseMoE])
@pytest.mark.parametrize("shape", [(5, 32), (1, 5, 16), (1, 1, 5, 32)])
def test_a_module_names_the_shape_it_was_given_and_the_one_it_takes(kind, shape):
    module = nnx.eval_shape(lambda: kind(small_config(), rngs=nnx.Rngs(0)))
    message = f"x is of shape {list(shape)}; expected an array [B, T, 32]"
    with pytest.raises(ValueError, match=re.escape(message)):
        module(jnp.zeros(shape))


@pytest.mark.usefixtures("untyped")
def test_mtp_names_the_shape_it_was_given_and_the_one_it_takes():
    mtp = nnx.eval_shape(lambda: q3n.MTP(small_config(), rngs=nnx.Rngs(0)))
    hidden = jnp.zeros((1, 5, 32))
    with pytest.raises(ValueError, match=r"hidden is of shape \[5, 32\]; .* \[B, T, 32\]"):
        mtp(hidden[0], hidden)
    with pytest.raises(ValueError, match=r"embeddings is of shape \[1, 4, 32\]; .* \[1, 5, 32\]"):
        mtp(hidden, hidden[:, 1:])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((jnp.ones(5, int),), "tokens is of shape [5]; expected an array [B, T]"),
        (([[1, 2, 3]],), "tokens is a list; expected an array [B, T]"),
        (
            (jnp.ones((2, 5), int), jnp.ones((1, 5), int)),
            "segment_ids is of shape [1, 5]; expected an array [2, 5]",
        ),
        (
            (jnp.ones((2, 5), int), None, jnp.arange(5)),
            "positions is of shape [5]; expected an array [2, 5]",
        ),
    ],
)
def test_a_model_names_what_it_was_given_and_the_shape_it_takes(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        abstract_model(small_config())(*given)


@pytest.mark.slow
def test_a_model_runs_where_double_precision_is_allowed():
    script = """
import jax.numpy as jnp
from flax import nnx
from oracles import random_model, small_config
import qwen3next_jax as q3n
from qwen3next_jax.training.loss import complete_batch
model = random_model(small_config(mtp_steps=1))
tokens = jnp.arange(40, dtype=jnp.int32).reshape(2, 20)
batch = complete_batch(tokens)
nnx.jit(nnx.value_and_grad(lambda model: q3n.loss(model, batch), has_aux=True))(model)
assert nnx.jit(lambda model: model(tokens))(model).dtype == jnp.float32
plain, fast = (
    q3n.generate(model, [[1, 2, 3], [4]], max_new_tokens=4, speculative=s) for s in (False, True)
)
assert plain == fast
"""
    run = run_python("-c", script, env={"JAX_ENABLE_X64": "1"}, capture_output=True)
    assert run.returncode == 0, run.stderr


def test_gates_stay_float32_when_all_other_parameters_are_bfloat16():
    model = abstract_model(small_config(mtp_steps=1), param_dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    for path, param in nnx.to_flat_state(nnx.state(model)):
        gate = path[-1] in ("A_log", "dt_bias")
        assert param.dtype == (jnp.float32 if gate else jnp.bfloat16), path


def test_logits_are_float32_whatever_the_compute_dtype():
    model = abstract_model(small_config(), param_dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    assert nnx.eval_shape(lambda m, t: m(t), model, tokens).dtype == jnp.float32


def test_without_zero_centring_the_norms_multiply_by_the_weight_itself():
    changes = dict(num_hidden_layers=1, full_attention_interval=1)
    centred = random_model(small_config(**changes))
    plain = abstract_model(small_config(**changes, zero_centered_norm=False))
    shifted = [
        (path, p.replace(p[...] + 1) if "norm" in "/".join(map(str, path)) else p)
        for path, p in nnx.to_flat_state(nnx.state(centred))
    ]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9), dtype=np.int32))

    def logits(graph, params):
        return quick_jit(lambda params: nnx.merge(graph, params)(tokens))(params)

    got = logits(nnx.split(plain)[0], nnx.from_flat_state(shifted))
    # 1 + w is rounded before rather than after it is stored.
    np.testing.assert_allclose(got, logits(*nnx.split(centred)), atol=1e-5)
    for config, start in ((centred.config, 0), (plain.config, 1)):
        assert (q3n.RMSNorm(config).weight[...] == start).all()


def test_without_the_output_gate_attention_is_that_of_a_gate_wide_open():
    def attention(**changes):
        config = small_config(**changes)
        make = lambda: q3n.GatedAttention(config, rngs=nnx.Rngs(0))  # noqa: E731
        return random_module(nnx.eval_shape(make))

    gated, plain = attention(), attention(attention_output_gate=False)
    assert plain.gate_proj is None
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(plain, name)[...] = getattr(gated, name)[...]
    for name in ("q_norm", "k_norm"):
        getattr(plain, name).weight[...] = getattr(gated, name).weight[...]
    gated.gate_proj[...] = jnp.zeros_like(gated.gate_proj[...])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 32)), jnp.float32)
    # sigmoid(0) halves, which is exact.
    np.testing.assert_allclose(2 * quick_jit(gated)(x), quick_jit(plain)(x), rtol=1e-6)
