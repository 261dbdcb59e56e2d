"""The optimizer: its table name by name, its arithmetic against numpy's, its schedules."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_run import small_config

from qwen3next_jax.config import OptimizerConfig
from qwen3next_jax.parallel.mesh import AXES
from qwen3next_jax.plan.search import abstract_mesh
from qwen3next_jax.training.optimizer import MUON_RMS, make_optimizer, make_schedule
from qwen3next_jax.training.program import make_program

CONFIG = OptimizerConfig(
    name="adamw",
    learning_rate=1e-2,
    schedule="constant",
    warmup_steps=0,
    decay_fraction=0.2,
    final_fraction=0.1,
    weight_decay=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    clip_norm=0.0,
)
MUON = dataclasses.replace(CONFIG, name="muon")
KEY = jax.random.key(0)

D, N, K, H, P, W, E, F, V, G = 8, 4, 2, 3, 5, 4, 6, 7, 16, 2

# Name: shape, decays, is a matrix to Muon. Written by hand from the model's description.
LAYER = {
    "input_layernorm/weight": ((D,), True, False),
    "post_attention_layernorm/weight": ((D,), True, False),
}
DELTA = {
    "linear_attn/q_proj": ((D, K, H), True, True),
    "linear_attn/k_proj": ((D, K, H), True, True),
    "linear_attn/v_proj": ((D, N, P), True, True),
    "linear_attn/z_proj": ((D, N, P), True, True),
    "linear_attn/b_proj": ((D, N), True, False),
    "linear_attn/a_proj": ((D, N), True, False),
    "linear_attn/q_conv": ((W, K, H), True, False),
    "linear_attn/k_conv": ((W, K, H), True, False),
    "linear_attn/v_conv": ((W, N, P), True, False),
    "linear_attn/A_log": ((N,), False, False),
    "linear_attn/dt_bias": ((N,), False, False),
    "linear_attn/norm/weight": ((P,), False, False),
    "linear_attn/out_proj": ((N, P, D), True, True),
}
ATTENTION = {
    "self_attn/q_proj": ((D, N, H), True, True),
    "self_attn/gate_proj": ((D, N, H), True, True),
    "self_attn/k_proj": ((D, K, H), True, True),
    "self_attn/v_proj": ((D, K, H), True, True),
    "self_attn/o_proj": ((N, H, D), True, True),
    "self_attn/q_norm/weight": ((H,), True, False),
    "self_attn/k_norm/weight": ((H,), True, False),
}
MOE = {
    "mlp/router": ((D, E), True, False),
    "mlp/gate_up_proj": ((E, 2, D, F), True, True),
    "mlp/down_proj": ((E, F, D), True, True),
    "mlp/shared_expert/gate_proj": ((D, F), True, True),
    "mlp/shared_expert/up_proj": ((D, F), True, True),
    "mlp/shared_expert/down_proj": ((F, D), True, True),
    "mlp/shared_expert_gate": ((D,), True, False),
}
DENSE = {
    "mlp/gate_proj": ((D, F), True, True),
    "mlp/up_proj": ((D, F), True, True),
    "mlp/down_proj": ((F, D), True, True),
}
ALL = {
    "embed_tokens": ((V, D), True, False),
    "lm_head": ((D, V), True, False),
    "norm/weight": ((D,), True, False),
    "mtp/fc": ((2, D, D), True, True),
    "mtp/norm/weight": ((D,), True, False),
    "mtp/pre_fc_norm_embedding/weight": ((D,), True, False),
    "mtp/pre_fc_norm_hidden/weight": ((D,), True, False),
    **{f"mtp/layer/{name}": what for name, what in (LAYER | ATTENTION | MOE).items()},
    **{
        f"groups/layers/{i}/{name}": ((G, *shape), *rest)
        for i, layer in enumerate([DELTA | MOE, ATTENTION | MOE, DELTA | DENSE])
        for name, (shape, *rest) in (LAYER | layer).items()
    },
}


def tree_of(flat, leaf=lambda x: x):
    """Nests a flat dict; layers are numbered as Flax does, by integers."""
    tree = {}
    for name, value in flat.items():
        *path, last = (int(key) if key.isdigit() else key for key in name.split("/"))
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf(value)
    return tree


def random_tree(seed):
    """All parameters, with axes of size 2: few distinct shapes compile quickly."""
    rng = np.random.default_rng(seed)
    flat = {name: rng.normal(size=[2] * len(shape)) for name, (shape, *_) in ALL.items()}
    return tree_of(flat, lambda x: jnp.asarray(x, jnp.float32))


def updates_of(config, params, grads, **kwargs):
    optimizer, _ = make_optimizer(config, 100, params, **kwargs)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


def keystr(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def changed(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path): bool(np.any(np.asarray(x) != 0)) for path, x in leaves}


def test_exactly_the_parameters_said_to_decay_do():
    params = random_tree(0)
    updates = updates_of(CONFIG, params, jax.tree.map(jnp.zeros_like, params))
    assert changed(updates) == {name: decays for name, (_, decays, _) in ALL.items()}
    # Decoupled: rate · weight_decay · p and no more, as the gradients are 0.
    expected = -CONFIG.learning_rate * CONFIG.weight_decay * params["embed_tokens"]
    np.testing.assert_allclose(updates["embed_tokens"], expected, rtol=1e-6)


def test_norm_weights_that_are_not_zero_centred_do_not_decay():
    params = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = updates_of(CONFIG, params, zeros, zero_centered_norm=False)
    assert changed(updates) == {
        name: decays and "norm" not in name for name, (_, decays, _) in ALL.items()
    }


def test_muon_takes_exactly_the_hidden_matrices_and_adamw_the_rest():
    params = random_tree(0)
    optimizer, _ = make_optimizer(MUON, 10, params)
    state = jax.eval_shape(optimizer.init, params)
    # Adam's second moments are kept for its parameters alone.
    [(_, nu)] = optax.tree.get_all_with_path(state, "nu")
    by_adam = {keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(nu)}
    assert by_adam == {name for name, (_, _, matrix) in ALL.items() if not matrix}
    moments = [tree for _, tree in optax.tree.get_all_with_path(state, "mu")]
    names = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(moments)]
    assert sorted(name.split("/", 1)[1] for name in names) == sorted(ALL)  # each in one of the two


def test_a_parameter_without_a_rule_is_refused_by_name():
    params = tree_of({"norm/weight": 1.0, "groups/layers/0/mlp/novelty": 1.0, "xnorm": 1.0})
    with pytest.raises(ValueError, match=r"groups/layers/0/mlp/novelty, xnorm$"):
        make_optimizer(CONFIG, 10, params)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("groups/layers/0/linear_attn/q_proj", (G, D, D)),  # a mixer of one's own, without heads
        ("groups/layers/0/linear_attn/out_proj", (G, E, N, P, D)),
        ("mtp/layer/self_attn/o_proj", (D, D)),
    ],
)
def test_muon_refuses_what_has_a_matrix_s_name_and_other_axes(name, shape):
    params = tree_of({name: shape, "norm/weight": (D,)}, jnp.zeros)
    with pytest.raises(ValueError, match=rf"other axes.*: {re.escape(f'{name} {list(shape)}')}$"):
        make_optimizer(MUON, 10, params)
    make_optimizer(CONFIG, 10, params)  # which takes each number by itself


def test_adamw_equals_numpy_over_several_clipped_steps():
    # Float64 against float32: a few roundings of 6e-8 in each of five steps.
    config = dataclasses.replace(CONFIG, schedule="cosine", warmup_steps=2, clip_norm=1.0)
    names = ["embed_tokens", "norm/weight", "groups/layers/0/linear_attn/A_log"]
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=ALL[name][0]) for name in names}
    m, v = ({name: np.zeros_like(x) for name, x in p.items()} for _ in range(2))
    params = tree_of(p, lambda x: jnp.asarray(x, jnp.float32))
    optimizer, schedule = make_optimizer(config, 5, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(5):
        # Norms of about 6 and 0.06: clipped, and left alone.
        g = {name: rng.normal(size=x.shape) * (0.5, 0.005)[step % 2] for name, x in p.items()}
        grads = tree_of(g, lambda x: jnp.asarray(x, jnp.float32))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert (norm > 1) == (step % 2 == 0)
        rate = float(schedule(step))
        for name, x in g.items():
            x = x * min(1, 1 / norm)
            m[name] = 0.9 * m[name] + 0.1 * x
            v[name] = 0.95 * v[name] + 0.05 * x**2
            m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0.0 if name.endswith("A_log") else 0.1
            p[name] = p[name] - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * p[name])
    for expected, got in zip(jax.tree.leaves(tree_of(p)), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_the_learning_rate_is_computed_once_and_not_for_each_parameter():
    config = dataclasses.replace(CONFIG, schedule="cosine", warmup_steps=2, clip_norm=1.0)
    params = random_tree(0)
    optimizer, _ = make_optimizer(config, 5, params)
    update = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
    text = update.compile().as_text()
    # Once in each branch of a conditional, which keeps it from being fused (`ops/cpu.py`).
    assert text.count(" cosine(") == 2


def matrices(name, x):
    """Cuts one array into the matrices it is made of, by hand."""
    if name.endswith("mtp/fc"):
        return x.reshape(1, 2 * D, D)
    if name.endswith(("out_proj", "o_proj")):
        return x.reshape(-1, x.shape[-3] * x.shape[-2], D)
    if "attn/" in name:
        return x.reshape(-1, D, x.shape[-2] * x.shape[-1])
    return x.reshape(-1, *x.shape[-2:])


# One of each arrangement of axes, with and without layer groups in front.
MATRICES = [
    "groups/layers/0/linear_attn/v_proj",
    "groups/layers/0/linear_attn/out_proj",
    "groups/layers/0/mlp/gate_up_proj",
    "groups/layers/0/mlp/down_proj",
    "groups/layers/2/mlp/down_proj",
    "mtp/fc",
    "mtp/layer/self_attn/q_proj",
    "mtp/layer/self_attn/o_proj",
    "mtp/layer/mlp/gate_up_proj",
    "mtp/layer/mlp/shared_expert/up_proj",
]


@pytest.mark.parametrize("name", MATRICES)
def test_muon_sets_each_matrix_singular_values_near_one(name):
    config = dataclasses.replace(MUON, weight_decay=0.0, learning_rate=1.0)
    grad = np.random.default_rng(0).normal(size=ALL[name][0]).astype(np.float32)
    if name.startswith("groups/"):
        grad[0] *= 1000  # layers of very different gradients: only alone does each get full size
    tree = tree_of({name: grad}, jnp.asarray)
    updates = updates_of(config, jax.tree.map(jnp.zeros_like, tree), tree)
    update = np.asarray(jax.tree.leaves(updates)[0])
    for u, g in zip(matrices(name, update), matrices(name, grad), strict=True):
        u = -u / (MUON_RMS * max(u.shape) ** 0.5)
        left, _, right = np.linalg.svd(g, full_matrices=False)
        # In the gradient's own singular basis the update is diagonal. Five Newton-Schulz steps
        # bring all but tiny singular values into about [0.7, 1.2].
        inside = left.T @ u @ right.T
        np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, atol=2e-2)
        assert np.diag(inside).min() > 0.3
        assert np.diag(inside).max() < 1.3


def test_muon_updates_a_stack_of_experts_as_each_expert_alone():
    name = "groups/layers/0/mlp/gate_up_proj"
    rng = np.random.default_rng(0)
    params, *grads = (rng.normal(size=(G, E, 2, D, F)).astype(np.float32) for _ in range(4))

    def run(cut):
        tree = tree_of({name: params}, lambda x: jnp.asarray(cut(x)))
        optimizer, _ = make_optimizer(MUON, 10, tree)
        state, update = optimizer.init(tree), jax.jit(optimizer.update)
        for grad in grads:
            updates, state = update(
                tree_of({name: grad}, lambda x: jnp.asarray(cut(x))), state, tree
            )
        return np.asarray(jax.tree.leaves(updates)[0])

    stacked = run(lambda x: x)
    for one in [(0, 0, 0), (0, 3, 1), (1, 5, 0)]:
        alone = run(lambda x, one=one: x[one])
        # The same products in another order, and five steps that spread the rounding.
        np.testing.assert_allclose(stacked[one], alone, atol=1e-5)


def test_muon_turns_around_when_nesterov_s_momentum_of_0_95_does():
    grad = np.random.default_rng(0).standard_normal((D, F), np.float32)
    tree = {"mlp": {"up_proj": jnp.asarray(grad)}}
    config = dataclasses.replace(MUON, weight_decay=0.0)
    optimizer, _ = make_optimizer(config, 20, tree)
    state, update = optimizer.init(tree), jax.jit(optimizer.update)
    momentum, want, got = 0.0, [], []
    for sign in [1] * 10 + [-1] * 10:
        # Jordan's: M ← 0.95 M + G, and what is made orthogonal is G + 0.95 M.
        momentum = 0.95 * momentum + sign
        want.append(bool(sign + 0.95 * momentum > 0))
        updates, state = update(jax.tree.map(lambda g, sign=sign: sign * g, tree), state, tree)
        got.append(bool((updates["mlp"]["up_proj"] * grad).sum() < 0))
    assert want.index(False) == 15  # the sixth that points the other way
    assert got == want


def test_muon_updates_are_as_large_as_those_of_adamw():
    # Adam's root mean square is 0.2 to 0.4 in training (Liu et al., arXiv:2502.16982); Muon's
    # singular values lie in about [0.7, 1.2], so the same factor is around 0.2.
    config = dataclasses.replace(MUON, weight_decay=0.0, learning_rate=1.0)
    for shape in [(32, 128), (128, 32)]:
        values = np.random.default_rng(0).standard_normal(shape, np.float32)
        grad = {"mlp": {"up_proj": jnp.asarray(values)}}
        updates = updates_of(config, jax.tree.map(jnp.zeros_like, grad), grad)
        rms = float(jnp.sqrt(jnp.mean(updates["mlp"]["up_proj"] ** 2)))
        assert 0.14 < rms < 0.24


def test_schedules_at_their_key_points():
    peak, steps, warmup = CONFIG.learning_rate, 100, 10
    for kind, points in {
        "constant": {10: 1.0, 50: 1.0, 100: 1.0},
        # Half-way between 10 and 100 the cosine is half-way between 1 and 0.1.
        "cosine": {10: 1.0, 55: 0.55, 100: 0.1, 150: 0.1},
        # The last fifth of 100 steps falls in a straight line.
        "wsd": {10: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1, 150: 0.1},
    }.items():
        config = dataclasses.replace(CONFIG, schedule=kind, warmup_steps=warmup)
        schedule = make_schedule(config, steps)
        for step, share in {0: 1 / 11, 4: 5 / 11, 9: 10 / 11, **points}.items():
            assert float(schedule(step)) == pytest.approx(share * peak, rel=1e-5), (kind, step)


def test_a_decay_over_all_steps_begins_where_the_rise_ends():
    config = dataclasses.replace(CONFIG, schedule="wsd", warmup_steps=10, decay_fraction=1.0)
    schedule = make_schedule(config, 100)
    for step, share in {9: 10 / 11, 10: 1.0, 55: 0.55, 100: 0.1}.items():
        assert float(schedule(step)) == pytest.approx(share * CONFIG.learning_rate, rel=1e-5), step


def test_schedules_without_warmup_start_at_the_peak():
    for kind in ("constant", "cosine", "wsd"):
        schedule = make_schedule(dataclasses.replace(CONFIG, schedule=kind), 100)
        assert float(schedule(0)) == pytest.approx(CONFIG.learning_rate)


def test_the_step_counter_drives_the_schedule():
    config = dataclasses.replace(CONFIG, schedule="wsd", warmup_steps=2, decay_fraction=0.5)
    params = {"embed_tokens": jnp.zeros((V, D))}
    grads = {"embed_tokens": jnp.ones((V, D))}
    optimizer, schedule = make_optimizer(config, 6, params)
    state = optimizer.init(params)
    for step in range(6):
        # Adam's direction of a constant gradient is 1.
        updates, state = optimizer.update(grads, state, params)
        np.testing.assert_allclose(updates["embed_tokens"], -schedule(step), rtol=1e-5)


def test_clipping_zero_is_no_clipping():
    # Adam forgets the scale of all gradients; two steps of different size show it.
    params = {"embed_tokens": jnp.zeros((V, D))}
    big, small = ({"embed_tokens": jnp.full((V, D), x)} for x in (10.0, 0.01))

    def second_update(clip_norm):
        config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
        optimizer, _ = make_optimizer(config, 10, params)
        _, state = optimizer.update(big, optimizer.init(params), params)
        return optimizer.update(small, state, params)[0]["embed_tokens"][0, 0]

    def adam(first, second):
        m = (0.09 * first + 0.1 * second) / (1 - 0.81)
        v = (0.05 * 0.95 * first**2 + 0.05 * second**2) / (1 - 0.9025)
        return -CONFIG.learning_rate * m / np.sqrt(v)

    assert float(second_update(0.0)) == pytest.approx(adam(10.0, 0.01), rel=1e-5)
    # The norm of [V, D] equal entries x is x · sqrt(V · D).
    clipped = 0.02 / np.sqrt(V * D)
    assert float(second_update(0.02)) == pytest.approx(adam(clipped, clipped), rel=1e-5)


def test_epsilon_dampens_what_is_no_larger():
    # The first direction of AdamW is g / (|g| + eps).
    grads = {"embed_tokens": jnp.full((V, D), 3e-4)}
    config = dataclasses.replace(CONFIG, eps=1e-4, weight_decay=0.0)
    updates = updates_of(config, jax.tree.map(jnp.zeros_like, grads), grads)
    np.testing.assert_allclose(updates["embed_tokens"], -0.75 * CONFIG.learning_rate, rtol=1e-5)


@pytest.mark.parametrize("zero_centered", [True, False])
def test_a_run_s_optimizer_knows_its_norms_and_the_dtype_of_its_moments(zero_centered):
    config = small_config(
        "unread", model__zero_centered_norm=zero_centered, precision__optimizer="bfloat16"
    )
    program = make_program(config, abstract_mesh(dict.fromkeys(AXES, 1)))
    mu = [m for _, m in optax.tree.get_all_with_path(program.state.opt_state, "mu")]
    assert {x.dtype.name for x in jax.tree.leaves(mu)} == {"bfloat16"}
    # Without a gradient only decay changes anything.
    params = {"norm": {"weight": jnp.ones(D)}, "embed_tokens": jnp.ones((V, D))}
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = program.optimizer.update(grads, program.optimizer.init(params), params)
    assert changed(updates) == {"embed_tokens": True, "norm/weight": zero_centered}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_have_their_dtypes_and_updates_are_float32_for_bfloat16_parameters(name):
    config = dataclasses.replace(CONFIG, name=name)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0))
    optimizer, _ = make_optimizer(config, 10, params, moment_dtype=jnp.bfloat16)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert after == state
    for field, dtype in {"mu": "bfloat16", "nu": "float32"}.items():
        moments = [moment for _, moment in optax.tree.get_all_with_path(state, field)]
        assert {x.dtype.name for x in jax.tree.leaves(moments)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_decay_as_those_in_float32(name):
    names = ["embed_tokens", "groups/layers/0/mlp/gate_up_proj"]
    params = tree_of({n: ALL[n][0] for n in names}, jnp.zeros)

    def moments(dtype):
        optimizer, _ = make_optimizer(
            dataclasses.replace(CONFIG, name=name), 300, params, moment_dtype=dtype
        )

        def step(state, key):
            grads = optax.tree.random_like(key, params)
            grads = jax.tree.map(lambda g: 1 + g, grads)
            return optimizer.update(grads, state, params)[1], None

        state, _ = jax.lax.scan(step, optimizer.init(params), jax.random.split(KEY, 300))
        mu = [m for _, m in optax.tree.get_all_with_path(state, "mu")]
        return [np.mean(x, dtype=np.float32) for x in jax.tree.leaves(mu)]

    # Each entry of the last moment is rounded to 8 bits, by up to 0.4%; their mean by far less. The
    # decays rounded to bfloat16, 0.8984 and 0.9492, would make the means 1.5% smaller.
    np.testing.assert_allclose(moments(jnp.bfloat16), moments(jnp.float32), rtol=2e-3)


def test_flax_variables_are_updated_as_plain_arrays():
    config = dataclasses.replace(MUON, clip_norm=1.0)
    names = ["embed_tokens", "norm/weight", "mtp/fc", "groups/layers/0/mlp/gate_up_proj"]
    rng = np.random.default_rng(0)
    params, grads = (
        tree_of({n: rng.standard_normal(ALL[n][0], np.float32) for n in names}, jnp.asarray)
        for _ in range(2)
    )
    expected = updates_of(config, params, grads)
    wrap = lambda tree: nnx.State(jax.tree.map(lambda x: nnx.Param(x, axes=("a",)), tree))  # noqa: E731
    got = updates_of(config, wrap(params), wrap(grads))
    assert jax.tree.structure(got) == jax.tree.structure(wrap(params))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_of_a_huge_model_is_planned_without_memory(name):
    config = dataclasses.replace(CONFIG, name=name)
    size = 2**20  # experts of 2**60 numbers in all
    flat = {
        "embed_tokens": jax.ShapeDtypeStruct((size, size), jnp.float32),
        "groups/layers/0/mlp/down_proj": jax.ShapeDtypeStruct(
            (2**10, 2**10, size, size), "float32"
        ),
    }
    params = tree_of(flat)
    optimizer, _ = make_optimizer(config, 10, params)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert after == state
