"""Diagnostics against the same numbers worked out in numpy from the weights and hidden states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles import quick_jit, random_module
from small_run import small_config

from qwen3next_jax.model.rope import apply_rope
from qwen3next_jax.parallel.names import named_leaves
from qwen3next_jax.training.diagnostics import for_all_layers, update_ratios
from qwen3next_jax.training.loss import complete_batch
from qwen3next_jax.training.program import abstract_model
from qwen3next_jax.training.step import make_gradients

# Two groups of two delta layers and one of attention, scanned; and the MTP module.
LAYERS = ["delta", "delta", "attention"] * 2
E, A = 4, 2


def config(**changes):
    given = dict(
        model__num_hidden_layers=6,
        model__full_attention_interval=3,
        model__mtp_steps=2,
        model__num_attention_heads=4,
        model__num_key_value_heads=2,
        train__global_batch_size=4,
        train__sequence_length=40,
    )
    return small_config("nowhere", **(given | changes))


@functools.cache
def parameters():
    model = nnx.merge(*abstract_model(config()))
    return nnx.state(random_module(model, seed=3, scale=0.3))


def batch():
    """Four rows of one to three documents, two of them with padding behind."""
    tokens = np.random.default_rng(0).integers(0, 256, (4, 40), dtype=np.int32)
    segments = np.ones((4, 40), np.int32)
    segments[1, 17:] = 2
    segments[2, 3:], segments[2, 21:], segments[2, 30:] = 2, 3, 0
    segments[3, 9:] = 0
    return complete_batch(jnp.asarray(tokens), jnp.asarray(segments))


@functools.cache
def gradients(**changes):
    c = config(**changes)
    graph, _ = abstract_model(c)
    return jax.device_get(quick_jit(make_gradients(graph, c))(parameters(), batch()))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normalized(x, norm):
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * (1 + np.asarray(norm.weight[...], np.float64))


def product(x, weight):
    return np.tensordot(x, np.asarray(weight[...], np.float64), 1)


@functools.cache
def expected():
    """By name, the numbers of the layers that have them, the MTP module's last."""
    graph, _ = abstract_model(config())
    model = nnx.merge(graph, parameters())

    @quick_jit
    def hidden_states(params, given):
        """Of each layer, what comes in, the mixer's part, what goes out; and its documents."""
        model = nnx.merge(graph, params)
        where = {k: given[k] for k in ("segment_ids", "positions")}
        found = []

        def run(layer, x, where):
            mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
            mixed = mixer(layer.input_layernorm(x), **where)
            out = layer(x, **where)[0]
            found.append((x, mixed, out, where["segment_ids"]))
            return out

        x = model.embed(given["tokens"])
        for layer in model._layers():
            x = run(layer, x, where)
        x, mtp = model.norm(x), model.mtp
        for ahead in (1, 2):

            def shift(a, ahead=ahead):
                return jnp.pad(a[:, ahead:], ((0, 0), (0, ahead)))

            segments = given["segment_ids"]
            inside = jnp.where(shift(segments) == segments, segments, 0)
            fc = mtp.fc[...]
            x = (
                mtp.pre_fc_norm_hidden(x) @ fc[1]
                + mtp.pre_fc_norm_embedding(model.embed(shift(given["tokens"]))) @ fc[0]
            )
            x = mtp.norm(run(mtp.layer, x, {**where, "segment_ids": inside}))
        return found

    given = batch()
    layers = [*model._layers(), model.mtp.layer]
    sums = [{} for _ in layers]  # of each layer, by name, values of single tokens
    found = jax.device_get(hidden_states(parameters(), given))
    for step, (x, mixed, out, segments) in enumerate(found):
        number = min(step, 6)  # both MTP steps are of one layer
        layer, real, into = layers[number], segments != 0, sums[number]
        x, mixed, out = (a.astype(np.float64) for a in (x, mixed, out))

        def tell(name, values, into=into):
            into.setdefault(name, []).append(values)

        normed = normalized(x, layer.input_layernorm)
        if hasattr(layer, "linear_attn"):
            m = layer.linear_attn
            tell("beta", sigmoid(product(normed, m.b_proj))[real])
            a = np.log1p(np.exp(product(normed, m.a_proj) + m.dt_bias[...]))
            tell("decay", (np.exp(np.asarray(m.A_log[...], np.float64)) * a)[real])
        else:
            m = layer.self_attn
            tell("output_gate", sigmoid(product(normed, m.gate_proj)).mean((2, 3))[real])
            positions, c = given["positions"], config().model
            q, k = (
                np.asarray(apply_rope(jnp.asarray(normalized(product(normed, w), n)), positions, c))
                for w, n in ((m.q_proj, m.q_norm), (m.k_proj, m.k_norm))
            )
            for row in range(4):
                # 40 tokens: stretches of 40 // 16 = 2, of which the last is looked at.
                for t in range(1, 40, 2):
                    start = np.flatnonzero(segments[row] == segments[row, t])[0]
                    if not real[row, t] or start == t:
                        continue
                    shares = []
                    for head in range(4):
                        scores = k[row, start : t + 1, head // 2] @ q[row, t, head] / 4  # √16
                        weights = np.exp(scores - scores.max())
                        shares.append(weights[0] / weights.sum())
                    tell("attention_sink", np.array([np.mean(shares)]))
        moe = layer.mlp
        normed = normalized(x + mixed, layer.post_attention_layernorm)
        tell("shared_gate", sigmoid(product(normed, moe.shared_expert_gate))[real])
        logits = product(normed, moe.router)[real]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        tell("router_entropy", -(p * np.log(p)).sum(-1) / np.log(E))
        tell("chosen", np.argsort(-p, axis=-1)[:, :A])
        tell("activation_max", np.abs(out[real]).max(keepdims=True).reshape(1))
    values = {}
    for told in sums:
        told = {name: np.concatenate(parts) for name, parts in told.items()}
        loads = np.bincount(told.pop("chosen").flatten(), minlength=E)
        share = loads / loads.sum()
        own = {
            "load_max": loads.max() / loads.mean(),
            "load_entropy": -(share * np.log(share)).sum() / np.log(E),
            "activation_max": told.pop("activation_max").max(),
        }
        for name, x in told.items():
            if name in ("decay", "beta"):
                heads = x.mean(0)
                own |= {f"{name}_mean": heads.mean(), f"{name}_min": heads.min()}
                own[f"{name}_max"] = heads.max()
            else:
                own[name] = x.mean()
        for name, x in own.items():
            values.setdefault(name, []).append(x)
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__gradient_accumulation_steps": 2, "train__remat": "layer"},
    ],
    ids=["one batch", "micro-batches, layers computed again"],
)
def test_layers_tell_what_numpy_finds_in_their_weights_and_states(changes):
    _, metrics = gradients(**changes)
    got = {k.removeprefix("layers/"): v for k, v in metrics.items() if k.startswith("layers/")}
    want = expected()
    assert got.keys() == want.keys()
    for name, values in want.items():
        # float32 through seven layers against float64 from float32 hidden states
        np.testing.assert_allclose(got[name], values, rtol=2e-4, err_msg=name)
    assert metrics["expert_load_max"] == pytest.approx(max(want["load_max"]), rel=1e-6)
    assert metrics["dropped_share"] == 0


@pytest.mark.slow
def test_diagnostics_change_neither_loss_nor_gradients():
    grads, metrics = gradients()
    plain_grads, plain = gradients(train__diagnostics=False)
    assert not [name for name in plain if name.startswith(("layers/", "update_ratio/"))]
    # The same float32 sums; the compiler may fuse them in another way.
    for name, value in plain.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    # Of a gradient as a whole: single entries may be near zero by cancellation.
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        assert jnp.linalg.norm(a - b) < 1e-5 * jnp.linalg.norm(b)


def test_numbers_stand_at_their_layers():
    model = config().model
    delta = for_all_layers(model, "layers/decay_mean", [1.0, 2.0, 3.0, 4.0])
    assert delta == [1.0, 2.0, None, 3.0, 4.0, None, None]
    attention = for_all_layers(model, "layers/attention_sink", [1.0, 2.0, 3.0])
    assert attention == [None, None, 1.0, None, None, 2.0, 3.0]
    assert for_all_layers(model, "layers/load_max", [*map(float, range(7))]) == [*range(7)]
    some = config(model__mlp_only_layers=(1,), model__intermediate_size=8, model__mtp_steps=0).model
    assert for_all_layers(some, "layers/shared_gate", [0.0, 1.0, 2.0, 3.0, 4.0]) == [
        0,
        None,
        1,
        2,
        3,
        4,
    ]
    assert for_all_layers(some, "layers/activation_max", [*map(float, range(6))]) == [*range(6)]


def test_numbers_of_unknown_layers_are_refused():
    with pytest.raises(ValueError, match=r"layers/depth is unknown"):
        for_all_layers(config().model, "layers/depth", [1.0] * 4)
    for count in (3, 5):
        with pytest.raises(ValueError, match=rf"decay_mean has {count} numbers, and 4 layers"):
            for_all_layers(config().model, "layers/decay_mean", [1.0] * count)


def test_update_ratios_are_norms_of_all_parameters_of_a_part():
    _, abstract = abstract_model(config())
    rng = np.random.default_rng(0)
    updates, params = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), abstract)
        for _ in range(2)
    )
    got = update_ratios(updates, params, zero_centered_norm=True)

    def part(name):
        if name.startswith("mtp"):
            return "mtp"
        words = {"embed": "embedding", "lm_head": "head", "linear_attn": "delta",
                 "self_attn": "attention", "router": "router", "gate_up": "feed_forward",
                 "mlp/down": "feed_forward", "shared_expert_gate": "router",
                 "shared_expert/": "shared_expert", "norm": "norms"}  # fmt: skip
        return next(value for word, value in words.items() if word in name)

    sums = {}
    for (name, u), (_, p) in zip(named_leaves(updates), named_leaves(params), strict=True):
        u, p = np.asarray(u, np.float64), np.asarray(p, np.float64)
        both = sums.setdefault(part(name), np.zeros(2))
        # All norms but the gated ones of delta layers multiply by 1 + w.
        centred = "norm" in name and "linear_attn" not in name
        both += (u**2).sum(), ((p + centred) ** 2).sum()
    assert got.keys() == {f"update_ratio/{name}" for name in sums}
    for name, (u, p) in sums.items():
        np.testing.assert_allclose(got[f"update_ratio/{name}"], np.sqrt(u / p), rtol=1e-5)


def test_update_ratios_leave_out_what_bfloat16_rounds_away():
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16)
    u = jnp.asarray(rng.normal(size=p.shape) * 1e-3, jnp.float32)
    ratios = jax.jit(functools.partial(update_ratios, zero_centered_norm=True))
    got = ratios({"lm_head": u}, {"lm_head": p})["update_ratio/head"]
    before = np.asarray(p, np.float64)
    after = np.asarray(optax.apply_updates({"head": p}, {"head": u})["head"], np.float64)
    want = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert not 0.9 < np.linalg.norm(u) / np.linalg.norm(before) / want < 1.1
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_ratios_to_norms_below_1_are_ratios_as_well():
    updates, params = ({"lm_head": jnp.full((2, 2), x)} for x in (0.01, 0.1))
    got = update_ratios(updates, params, zero_centered_norm=True)["update_ratio/head"]
    np.testing.assert_allclose(got, 0.1, rtol=1e-6)  # one rounding of each number
