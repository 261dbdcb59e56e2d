"""Modules and operations as others import them: what they refuse, and second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import abstract_model, quick_jit, random_module, small_config

import qwen3next_jax as q3n
from qwen3next_jax import ops
from qwen3next_jax.config import FULL, LINEAR
from qwen3next_jax.model import gated_attention, gated_delta_net, moe
from qwen3next_jax.model.cache import empty_cache
from qwen3next_jax.model.decoder_layer import DecoderLayer
from qwen3next_jax.model.gated_attention import GatedAttention
from qwen3next_jax.model.gated_delta_net import GatedDeltaNet
from qwen3next_jax.model.layers import RMSNorm, project, rms_normalize
from qwen3next_jax.model.moe import SparseMoE
from qwen3next_jax.model.rope import apply_rope

pytestmark = pytest.mark.usefixtures("untyped")

B, T = 2, 6
CONFIG = small_config()
MODULES = (GatedAttention, GatedDeltaNet, SparseMoE)


def make(module):
    return module(CONFIG, rngs=nnx.Rngs(0))


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def call(module, x, **given):
    return (module.with_stats if isinstance(module, SparseMoE) else module)(x, **given)


X = drawn(B, T, CONFIG.hidden_size)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        (X[0], {}, "x is of shape .* expected an array"),
        (X[:0], {}, "0 rows of 6 tokens hold no token"),
        (X.astype(jnp.int32), {}, "x is of int32; expected floats"),
        (X, {"segment_ids": jnp.ones(T, jnp.int32)}, r"segment_ids is of shape \[6\]"),
        (X, {"segment_ids": jnp.ones((1, T), jnp.int32)}, r"segment_ids is of shape \[1, 6\]"),
        (X, {"segment_ids": [[1] * T] * B}, r"segment_ids is a list; expected an array \[2, 6\]"),
        (X, {"segment_ids": np.ones((B, T), bool)}, "segment_ids is of bool; expected integers"),
    ],
)
def test_modules_refuse_what_is_no_batch(module, x, given, message):
    with pytest.raises(ValueError, match=message):
        call(make(module), x, **given)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(part):
                yield from equations(getattr(part, "jaxpr", part))


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 3)), r"x is float32\[2, 3\]; expected floats \[..., 8\]"),
        (jnp.ones(8, jnp.int32), r"x is int32\[8\]; expected floats"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_a_norm_refuses_what_it_cannot_normalise(x, message):
    with pytest.raises(ValueError, match=message):
        RMSNorm(CONFIG, 8)(x)


@pytest.mark.parametrize("module", [GatedAttention, GatedDeltaNet])
def test_nonlinearities_are_float32_whatever_the_activations_are(module):
    jaxpr = jax.make_jaxpr(make(module))(X.astype(jnp.bfloat16))
    nonlinear = {"logistic", "exp", "exp2", "log1p", "rsqrt", "sqrt", "tanh"}
    found = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in nonlinear]
    assert {"logistic", "rsqrt"} <= {e.primitive.name for e in found}
    assert {str(e.invars[0].aval.dtype) for e in found} == {"float32"}


def test_the_delta_rules_gates_are_not_rounded_where_activations_are_bfloat16():
    module, observed = make(GatedDeltaNet), {}
    x = X[:1, :1].astype(jnp.bfloat16)
    module(x, observed=observed)

    def product(w):
        row, matrix = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x[0, 0], w[...]))
        return row @ matrix

    want = {
        "beta": 1 / (1 + np.exp(-product(module.b_proj))),
        "decay": np.exp(np.asarray(module.A_log[...], np.float64))
        * np.log1p(np.exp(product(module.a_proj) + np.asarray(module.dt_bias[...]))),
    }
    for name, values in want.items():
        # As float32 sums of exact products are; rounded to bfloat16 they are off by 1e-4.
        np.testing.assert_allclose(observed[name].total, values, rtol=1e-6)


def assert_rounded_once(function, x):
    """What bfloat16 gives is what float32 gives of the same numbers, rounded at the end."""
    exact = function(x.astype(jnp.float32))
    np.testing.assert_array_equal(function(x), exact.astype(jnp.bfloat16))


def test_a_norm_rounds_to_bfloat16_once():
    norm = RMSNorm(CONFIG)
    norm.weight[...] = drawn(CONFIG.hidden_size, seed=5)
    assert_rounded_once(norm, X.astype(jnp.bfloat16))


def test_a_rotation_rounds_to_bfloat16_once():
    positions = jnp.arange(T)[None].repeat(B, 0)
    x = drawn(B, T, 4, CONFIG.head_dim).astype(jnp.bfloat16)
    assert_rounded_once(lambda x: apply_rope(x, positions, CONFIG), x)


def with_weights(module):
    return random_module(nnx.eval_shape(lambda: make(module)), scale=0.5)


def hand_on_heads(weight):
    """Makes an output projection hand on the first entries of all heads as they are."""
    rows = weight.shape[0] * weight.shape[1]
    weight[...] = jnp.eye(rows, weight.shape[2]).reshape(weight.shape)


def test_the_output_gate_is_applied_in_float32_and_rounded_once(monkeypatch):
    x = X.astype(jnp.bfloat16)
    out = drawn(B, T, 4, CONFIG.head_dim, seed=9).astype(jnp.bfloat16)
    monkeypatch.setattr(gated_attention, "attention", lambda *_, **__: out)
    module = with_weights(GatedAttention)
    hand_on_heads(module.o_proj)
    gate = jax.nn.sigmoid(project(x, module.gate_proj[...].astype(x.dtype)).astype(jnp.float32))
    want = (out.astype(jnp.float32) * gate).astype(jnp.bfloat16).reshape(B, T, -1)
    np.testing.assert_array_equal(module(x), want[..., : CONFIG.hidden_size])


def test_the_gated_norm_is_float32_and_rounded_once(monkeypatch):
    x = X.astype(jnp.bfloat16)
    out = drawn(B, T, 4, CONFIG.linear_value_head_dim, seed=9).astype(jnp.bfloat16)
    monkeypatch.setattr(gated_delta_net.context, "gated_delta_rule", lambda *_, **__: (out, None))
    module = with_weights(GatedDeltaNet)
    hand_on_heads(module.out_proj)
    gate = jax.nn.silu(project(x, module.z_proj[...].astype(x.dtype)).astype(jnp.float32))
    normed = rms_normalize(out, CONFIG.rms_norm_eps) * module.norm.weight[...]
    want = (normed * gate).astype(jnp.bfloat16).reshape(B, T, -1)
    np.testing.assert_array_equal(module(x), want[..., : CONFIG.hidden_size])


def test_the_shared_expert_s_gate_is_applied_in_float32_and_rounded_once(monkeypatch):
    x = X.astype(jnp.bfloat16)
    monkeypatch.setattr(moe, "apply_experts", lambda tokens, *_, **__: 0 * tokens)
    module = with_weights(SparseMoE)
    row = module.shared_expert_gate[...]
    gate = jax.nn.sigmoid(jnp.dot(x.astype(jnp.float32), row, precision="highest"))
    want = (gate[..., None] * module.shared_expert(x).astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(module(x), want)


def test_experts_weights_are_not_rounded_where_activations_are_bfloat16(monkeypatch):
    taken = []

    def no_experts(rows, weights, *_, **__):
        taken.append(weights)
        return rows

    monkeypatch.setattr(moe, "expert_mlp", no_experts)
    module = with_weights(SparseMoE)

    @quick_jit
    def weights_of_rows(x):
        module(x)
        return taken.pop()

    weights = weights_of_rows(X.astype(jnp.bfloat16))
    assert (weights != weights.astype(jnp.bfloat16)).any()


def test_the_delta_rule_s_state_in_a_cache_is_float32_whatever_the_activations_are():
    x = X[:, :1].astype(jnp.bfloat16)
    cache = empty_cache(CONFIG, LINEAR, batch=B, slots=T, dtype=x.dtype)
    _, after = jax.eval_shape(lambda x, cache: make(GatedDeltaNet)(x, cache=cache), x, cache)
    assert cache.state.dtype == after.state.dtype == jnp.float32


def test_no_head_is_drawn_that_forgets_more_slowly_than_at_a_rate_of_a_hundredth():
    rates = np.exp(gated_delta_net._log_uniform(jax.random.key(0), (10**5,)))
    assert rates.min() >= 0.01 * (1 - 1e-6)  # logarithms of float32


def test_attention_with_a_cache_needs_the_positions_of_its_tokens():
    module = make(GatedAttention)
    cache = empty_cache(CONFIG, FULL, batch=B, slots=T, dtype=jnp.float32)
    with pytest.raises(ValueError, match="With a cache give positions"):
        module(X[:, :1], cache=cache)
    steps = []
    for t in range(T):
        y, cache = module(X[:, t : t + 1], positions=jnp.full((B, 1), t), cache=cache)
        steps.append(y)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), module(X), atol=1e-5)


def test_without_segment_ids_all_tokens_go_into_the_delta_rule_s_cache():
    module = make(GatedDeltaNet)
    cache = empty_cache(CONFIG, LINEAR, batch=B, slots=T, dtype=jnp.float32)
    _, after = quick_jit(lambda x: module(x, cache=cache))(X)
    last = jnp.tensordot(X[:, -after.q_tail.shape[1] :], module.q_proj[...], 1)
    np.testing.assert_allclose(after.q_tail, last, atol=1e-6)  # the same products


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_model_s_caches_hold_activations_in_its_compute_dtype_or_float32_on_a_cpu(
    platform, monkeypatch
):
    monkeypatch.setattr("qwen3next_jax.ops.cpu.platform", lambda: platform)
    caches = abstract_model(CONFIG, dtype=jnp.bfloat16).empty_cache(batch=1, slots=4)
    kinds = {name: x.dtype for cache in caches for name, x in cache._asdict().items()}
    activations = jnp.float32 if platform == "cpu" else jnp.bfloat16
    assert kinds == {**dict.fromkeys(kinds, activations), "state": jnp.float32}


@pytest.mark.parametrize("module", [GatedAttention, GatedDeltaNet])
def test_a_module_takes_the_implementation_that_it_is_told(module):
    with pytest.raises(ValueError, match="'mine' is unknown"):
        make(module)(X, implementation="mine")


def test_configs_without_such_layers_are_refused():
    dense = small_config(
        layer_types=(FULL,) * CONFIG.num_hidden_layers,
        linear_num_value_heads=0,
        num_experts=0,
        intermediate_size=16,
    )
    with pytest.raises(ValueError, match=r"no linear_\* sizes"):
        GatedDeltaNet(dense, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_experts=0; give that of a model with experts"):
        SparseMoE(dense, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"mixer: 'linear' \(did you mean 'linear_attention'"):
        DecoderLayer(CONFIG, "linear", True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mixer: 'full'"):
        empty_cache(CONFIG, "full", batch=1, slots=4, dtype=jnp.float32)


K, N, H, P = 2, 4, 5, 7
RULE = dict(
    q=drawn(B, T, K, H),
    k=drawn(B, T, K, H, seed=1),
    v=drawn(B, T, N, P, seed=2),
    log_decay=-jnp.ones((B, T, N)),
    beta=jnp.full((B, T, N), 0.5),
    segment_ids=jnp.ones((B, T), jnp.int32),
    initial_state=drawn(B, N, H, P, seed=3),
)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("k", lambda x: x[:1]),
        ("v", lambda x: x[:, 1:]),
        ("log_decay", lambda x: x[:, 1:]),
        ("beta", lambda x: x[..., :1]),
        ("segment_ids", lambda x: x[0]),
        ("initial_state", lambda x: x.swapaxes(2, 3)),
    ],
)
def test_the_delta_rule_refuses_arrays_that_do_not_belong_together(implementation, name, cut):
    ops.gated_delta_rule(**RULE, implementation=implementation)
    given = {**RULE, name: cut(RULE[name])}
    with pytest.raises(ValueError, match=f"{name} is of shape .*; expected an array"):
        ops.gated_delta_rule(**given, implementation=implementation)


def test_other_operations_refuse_arrays_that_do_not_belong_together():
    q, k, v = drawn(B, T, 4, 8), drawn(B, T, 2, 8), drawn(B, T, 2, 8)
    for name, given in (("k", (q, k[:1], v)), ("v", (q, k, v[:, :, :1]))):
        with pytest.raises(ValueError, match=f"{name} is of shape .*; expected an array"):
            ops.attention(*given)
    rows, weights = drawn(6, 8), drawn(3, 8, 4)
    with pytest.raises(ValueError, match=r"group_sizes is of shape \[2\]; expected an array \[3\]"):
        ops.grouped_matmul(rows, weights, jnp.array([3, 3]))
    with pytest.raises(
        ValueError, match=r"kernel is of shape \[4, 3\]; expected an array \[4, 5\]"
    ):
        ops.causal_conv(drawn(B, T, 5), drawn(4, 3))
    with pytest.raises(ValueError, match=r"x is of shape \[6, 5\]; expected an array \[B, T, chan"):
        ops.causal_conv(drawn(T, 5), drawn(4, 5))
    targets = jnp.zeros((B, T), jnp.int32)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        ops.cross_entropy(X, drawn(X.shape[-1], 9), targets, jnp.ones((B, T)), chunk=0)


@pytest.mark.usefixtures("untyped")
def test_operations_do_not_round_to_integers():
    q, k, v = drawn(B, T, 4, 8), drawn(B, T, 2, 8), jnp.ones((B, T, 2, 8), jnp.int32)
    with pytest.raises(ValueError, match="v is of int32; expected floats"):
        ops.attention(q, k, v)
    with pytest.raises(ValueError, match="v is of int32; expected floats"):
        ops.gated_delta_rule(**{**RULE, "v": RULE["v"].astype(jnp.int32)})
    with pytest.raises(ValueError, match="x is of int32; expected floats"):
        ops.causal_conv(jnp.ones((B, T, 5), jnp.int32), drawn(4, 5))
    with pytest.raises(ValueError, match="initial_state is of int32; expected floats"):
        ops.gated_delta_rule(**{**RULE, "initial_state": jnp.ones((B, N, H, P), jnp.int32)})
    rows, sizes = jnp.ones((2, 3), jnp.int32), jnp.array([2])
    with pytest.raises(ValueError, match="rows is of int32; expected floats"):
        ops.grouped_matmul(rows, drawn(1, 3, 2), sizes)
    targets, head = jnp.zeros((B, T), jnp.int32), jnp.ones((X.shape[-1], 9), jnp.int32)
    with pytest.raises(ValueError, match="head is of int32; expected floats"):
        ops.cross_entropy(X, head, targets, jnp.ones((B, T)))


@pytest.mark.usefixtures("untyped")
def test_operations_name_what_is_no_array():
    with pytest.raises(ValueError, match=r"q is of shape \[\]; expected an array \[B, T, K, H\]"):
        ops.gated_delta_rule(**{**RULE, "q": jnp.zeros(())})
    with pytest.raises(ValueError, match="v is a list; expected an array"):
        ops.gated_delta_rule(**{**RULE, "v": [1.0]})
    with pytest.raises(ValueError, match=r"kernel is a list; expected an array \[W, 5\]"):
        ops.causal_conv(drawn(B, T, 5), [1.0])
    with pytest.raises(ValueError, match=r"tail is of shape \[3\]; expected an array"):
        ops.causal_conv(drawn(B, T, 5), drawn(4, 5), tail=drawn(3))
    with pytest.raises(ValueError, match="kernel has 0 taps"):
        ops.causal_conv(drawn(B, T, 5), drawn(0, 5))
    with pytest.raises(ValueError, match="2 rows of 0 tokens"):
        ops.causal_conv(drawn(2, 0, 5), drawn(4, 5))


def test_weights_that_are_drawn_need_keys():
    with pytest.raises(ValueError, match=r"rngs is a int; give flax\.nnx\.Rngs"):
        GatedDeltaNet(CONFIG, rngs=0)
    with pytest.raises(TypeError, match="NoneType"):
        GatedDeltaNet(CONFIG, rngs=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_and_its_gradients_are_traced_under_strict_promotion(dtype):
    model = abstract_model(small_config(mtp_steps=1), dtype=dtype)
    batch = q3n.complete_batch(jnp.arange(12).reshape(2, 6), jnp.array([[1] * 4 + [2] * 2] * 2))
    with jax.numpy_dtype_promotion("strict"):
        grads = nnx.eval_shape(nnx.grad(lambda model: q3n.loss(model, batch)[0]), model)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, nnx.state(model, nnx.Param))


@pytest.mark.parametrize("module", [GatedAttention, GatedDeltaNet, RMSNorm, SparseMoE])
def test_float64_of_numpy_is_taken_without_a_warning(module, recwarn):
    make(module)(np.asarray(X, np.float64))
    assert not recwarn.list


@pytest.mark.parametrize("module", [GatedAttention, GatedDeltaNet, SparseMoE])
def test_arrays_on_a_mesh_of_explicit_axes_are_refused_with_what_to_take(module):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("data")))
    with pytest.raises(ValueError, match=r"axes data are explicit; make it by .*make_mesh"):
        jax.jit(make(module))(x)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("module", [GatedAttention, GatedDeltaNet])
def test_hessian_vector_products_are_those_of_differences(module, packed):
    graph, params = nnx.split(make(module))
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]]) if packed else None

    @jax.jit
    def gradient(x):
        def loss(x):
            return (nnx.merge(graph, params)(x, segment_ids=segment_ids) ** 2).sum()

        return jax.grad(loss)(x)

    direction = drawn(*X.shape, seed=1)
    _, product = jax.jit(lambda x, d: jax.jvp(gradient, (x,), (d,)))(X, direction)
    h = 1e-2
    difference = (gradient(X + h * direction) - gradient(X - h * direction)) / (2 * h)
    scale = jnp.abs(difference).max()
    assert jnp.abs(product - difference).max() < 1e-2 * scale
    assert jnp.abs(product).max() > 0.5 * scale  # whatever its size


def test_with_64_bits_states_and_losses_stay_of_32():
    with jax.enable_x64(True):
        cache = empty_cache(CONFIG, LINEAR, batch=B, slots=T, dtype=jnp.float32)
        assert cache.state.dtype == jnp.float32
        total, _ = ops.cross_entropy(
            X, drawn(X.shape[-1], 9), jnp.zeros((B, T), jnp.int32), jnp.ones((B, T))
        )
        assert total.dtype == jnp.float32


@pytest.mark.parametrize("into", [None, jnp.float32])
def test_a_projection_of_bfloat16_is_rounded_once_and_copies_no_matrix(into):
    x, w = drawn(B, T, 64).astype(jnp.bfloat16), drawn(64, 8, 128, seed=1).astype(jnp.bfloat16)
    exact = np.einsum("btd,dnh->btnh", *(np.asarray(a, np.float64) for a in (x, w)))
    program = jax.jit(lambda x, w: project(x, w, into=into)).lower(x, w).compile()
    got = program(x, w)
    assert got.dtype == (into or jnp.bfloat16)
    rounding = 2**-8 if into is None else 2**-20
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=rounding, atol=1e-5)
    assert program.memory_analysis().temp_size_in_bytes < w.nbytes / 2
