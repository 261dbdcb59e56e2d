"""The loss term by term: what is counted, over what it is averaged, and where gradients go."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import quick_jit, random_model, random_module, relative_error, small_config
from small_run import small_config as small_run_config
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

import qwen3next_jax as q3n
from qwen3next_jax.model import gated_attention
from qwen3next_jax.model.moe import RouterStats, SparseMoE
from qwen3next_jax.training.loss import complete_batch, count_labels, next_token_losses
from qwen3next_jax.training.program import abstract_model
from qwen3next_jax.training.step import make_gradients

E, A = 7, 3  # experts, experts a token


def build(**changes):
    """Attention layers alone, which are enough for a loss."""
    given = dict(num_hidden_layers=1, full_attention_interval=1, mtp_steps=2) | changes
    return random_model(small_config(**given), scale=0.3)


def make_batch():
    """Four rows of one or two documents, some with padding behind."""
    tokens = np.random.default_rng(0).integers(0, 61, (4, 20), dtype=np.int32)
    segments = np.ones((4, 20), np.int32)
    segments[1, 7:] = 2
    segments[2, 3:], segments[2, 16:] = 2, 0
    segments[3, 4:], segments[3, 10:] = 2, 0
    return complete_batch(jnp.asarray(tokens), jnp.asarray(segments))


LABELS, DOCUMENTS = 19 + 18 + 14 + 8, 7


def rows(batch, *which):
    return {name: x[np.array(which)] for name, x in batch.items()}


@functools.cache
def with_mtp():
    return nnx.split(build())


@functools.cache
def value_and_metrics():
    graph, _ = with_mtp()
    return quick_jit(lambda p, b: q3n.loss(nnx.merge(graph, p), b, z_weight=0.5))


@functools.cache
def metrics():
    value, metrics = value_and_metrics()(with_mtp()[1], make_batch())
    return {**metrics, "loss": value}


def test_the_loss_is_the_sum_of_its_terms_with_their_weights():
    m = metrics()
    total = m["ce"] + 0.1 * m["mtp_ce"] + 1e-3 * m["balance_loss"] + 0.5 * m["router_z_loss"]
    np.testing.assert_allclose(m["loss"], total, rtol=1e-6)
    # The MTP module is one more layer, whose two steps take the tokens with one or two after them.
    tokens = [int((make_batch()["segment_ids"] > 0).sum()), LABELS + LABELS - DOCUMENTS]
    np.testing.assert_array_equal(m["assignments"].sum(1), A * np.array(tokens))


def test_a_mean_is_over_the_weights_of_its_labels_and_not_over_their_number():
    batch = make_batch()
    weights = 0.25 * batch["loss_weights"]
    _, lighter = value_and_metrics()(with_mtp()[1], {**batch, "loss_weights": weights})
    for term in ("ce", "mtp_ce"):
        # A power of two changes no digit of a product or a sum.
        np.testing.assert_allclose(lighter[term], metrics()[term], rtol=1e-6, err_msg=term)


def test_four_micro_batches_give_the_gradients_of_one_batch():
    graph, params = nnx.split(build(router_aux_loss_coef=0.0, mtp_steps=1))
    batch = make_batch()

    def value(params, batch, counts):
        return q3n.loss(nnx.merge(graph, params), batch, counts=counts)[0]

    gradient = quick_jit(jax.grad(value))
    counts = count_labels(batch, 1)
    assert counts.ce == LABELS
    whole = jax.device_get(gradient(params, batch, counts))
    parts = [jax.device_get(gradient(params, rows(batch, i), counts)) for i in range(4)]
    summed = jax.tree.map(lambda *g: sum(g), *parts)
    # The same float32 terms, summed in another order.
    floor = 1e-3 * np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(whole)))
    errors = jax.tree.map(lambda a, b: relative_error(a, b, floor), summed, whole)
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_a_step_counts_its_tokens_without_padding_and_whether_or_not_they_are_labels():
    config = small_run_config("nowhere", train__global_batch_size=4, train__sequence_length=20)
    graph, shapes = abstract_model(config)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    batch = make_batch()
    batch = {**batch, "loss_weights": batch["loss_weights"].at[:2].set(0)}  # prompts, say
    gradients = make_gradients(graph, config)
    counted = quick_jit(lambda p, b: gradients(p, b)[1]["tokens"])(params, batch)
    assert counted == LABELS + DOCUMENTS == (batch["segment_ids"] != 0).sum()


def test_mtp_steps_beyond_the_row_predict_nothing():
    graph, params = nnx.split(build(mtp_steps=3))
    batch = complete_batch(jnp.asarray([[1, 2]]))
    metrics = quick_jit(lambda p, b: q3n.loss(nnx.merge(graph, p), b)[1])(params, batch)
    assert metrics["mtp_ce"] == 0
    assert jnp.isfinite(metrics["ce"])


@functools.cache
def without_mtp():
    return nnx.split(build(num_hidden_layers=2, mtp_steps=0))


@functools.cache
def balance(scope):
    graph, _ = without_mtp()

    @quick_jit
    def f(params, batch, earlier):
        metrics = q3n.loss(
            nnx.merge(graph, params), batch, balance_scope=scope, earlier_assignments=earlier
        )[1]
        return metrics["balance_loss"], metrics["assignments"]

    return f


@functools.cache
def statistics():
    """What the two layers' routers did with each row, from the model itself: [L, B, E], [B]."""
    graph, params = without_mtp()
    b = make_batch()
    stats = quick_jit(
        lambda params: nnx.merge(graph, params).hidden_states(
            b["tokens"], b["segment_ids"], b["positions"]
        )[1]
    )(params)
    return np.asarray(stats.counts), np.asarray(stats.probabilities), np.asarray(stats.tokens[0])


def test_the_batch_s_positions_are_those_that_are_rotated_by(monkeypatch):
    graph, params = nnx.split(build(mtp_steps=1, num_experts=0, intermediate_size=24))
    batch = {**make_batch(), "positions": jnp.zeros((4, 20), jnp.int32)}

    def terms():
        f = quick_jit(lambda params: q3n.loss(nnx.merge(graph, params), batch)[1])
        return [f(params)[name] for name in ("ce", "mtp_ce")]

    got = terms()
    monkeypatch.setattr(gated_attention, "apply_rope", lambda x, *_: x)
    np.testing.assert_allclose(got, terms(), rtol=1e-6)  # at position 0 nothing is rotated


def test_the_global_scope_is_transformers_balance_loss_layer_by_layer():
    _, params = without_mtp()
    b = make_batch()
    got, assignments = balance("global")(params, b, None)
    counts, probabilities, tokens = statistics()
    np.testing.assert_array_equal(assignments, counts.sum(1))
    # From the definition, E Σ f P of each layer, with Σ f = 1.
    f = counts.sum(1) / counts.sum((1, 2))[:, None]
    P = probabilities.sum(1) / tokens.sum()
    np.testing.assert_allclose(got, (E * (f * P).sum(1)).mean(), rtol=1e-5)


def test_transformers_balance_loss_is_ours_times_the_experts_a_token():
    config = small_config()
    layer = random_module(nnx.eval_shape(lambda: SparseMoE(config, rngs=nnx.Rngs(0))), scale=0.5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 32)), jnp.float32)
    stats = quick_jit(layer.with_stats)(x)[1]
    f = stats.counts.sum(0) / stats.counts.sum()
    P = stats.probabilities.sum(0) / stats.tokens.sum()
    logits = torch.tensor(np.asarray(x.reshape(-1, 32) @ layer.router[...]))
    want = theirs.load_balancing_loss_func((logits,), E, A) / A
    np.testing.assert_allclose(E * (f * P).sum(), want.item(), rtol=1e-5)


def test_scopes_differ_in_the_tokens_that_the_loads_are_taken_over():
    graph, params = without_mtp()
    batch = make_batch()
    counts, probabilities, tokens = statistics()

    def product(counts, probabilities, tokens):
        share = counts / counts.sum(-1, keepdims=True)
        return (E * (share * probabilities / tokens).sum(-1)).mean()

    # The second half of the rows after the first: "global" counts the loads of both.
    first, second = rows(batch, 0, 1), rows(batch, 2, 3)
    _, earlier = balance("global")(params, first, jnp.zeros((2, E)))
    np.testing.assert_array_equal(earlier, counts[:, :2].sum(1))
    P, T = probabilities[:, 2:].sum(1), tokens[2:].sum()
    got, total = balance("global")(params, second, earlier)
    np.testing.assert_array_equal(total, counts.sum(1))
    np.testing.assert_allclose(got, product(counts.sum(1), P, T), rtol=1e-5)
    got, total = balance("micro_batch")(params, second, earlier)
    np.testing.assert_array_equal(total, counts.sum(1))
    np.testing.assert_allclose(got, product(counts[:, 2:].sum(1), P, T), rtol=1e-5)
    # "sequence" takes each row by itself.
    got, _ = balance("sequence")(params, second, earlier)
    want = product(counts[:, 2:], probabilities[:, 2:], tokens[2:, None])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    with pytest.raises(ValueError, match="'batch' is unknown; expected 'global'"):
        q3n.loss(nnx.merge(graph, params), batch, balance_scope="batch")


def with_router(params, change):
    """The parameters with each router replaced by change(router)."""
    flat = [
        (path, p.replace(change(p[...])) if path[-1] == "router" else p)
        for path, p in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(flat)


def test_a_row_of_padding_counts_in_no_mean_over_rows():
    _, params = without_mtp()
    padded = {name: x.at[1].set(0) for name, x in make_batch().items()}
    got, _ = balance("sequence")(params, padded, jnp.zeros((2, E)))
    rest = [0, 2, 3]
    counts, probabilities, tokens = statistics()
    counts, probabilities, tokens = counts[:, rest], probabilities[:, rest], tokens[rest, None]
    share = counts / counts.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        got, (E * (share * probabilities / tokens).sum(-1)).mean(), rtol=1e-5
    )


def test_an_even_router_has_the_z_loss_of_equal_logits_in_each_layer():
    # They are 0, and log Σ exp of E such is log E: for all tokens of all layers, the MTP's as well.
    even = with_router(with_mtp()[1], jnp.zeros_like)
    _, found = value_and_metrics()(even, make_batch())
    np.testing.assert_allclose(found["router_z_loss"], np.log(E) ** 2, rtol=1e-6)


def that_tells(**stats):
    """In place of a model, one of two layers whose routers tell these statistics of two rows."""
    given = dict(counts=jnp.ones((2, 2, E)), probabilities=jnp.ones((2, 2, E)))
    given |= dict.fromkeys(("squared_lse", "entropies", "tokens"), jnp.ones((2, 2)))
    stats = RouterStats(**{**given, "dropped": jnp.zeros((2, 1, 1)), **stats})
    return types.SimpleNamespace(
        config=small_config(),
        mtp=None,
        hidden_states=lambda *_: (jnp.ones((2, 4, 3)), stats),
        head=lambda: jnp.ones((3, 5)),
    )


@pytest.mark.usefixtures("untyped")
def test_the_z_loss_is_the_mean_over_tokens_without_padding_then_over_layers():
    tokens, sums = [[1.0, 3.0], [1.0, 3.0]], [[1.0, 8.0], [3.0, 20.0]]
    model = that_tells(tokens=jnp.array(tokens), squared_lse=jnp.array(sums))
    batch = complete_batch(jnp.ones((2, 4), jnp.int32))
    assert q3n.loss(model, batch)[1]["router_z_loss"] == (9 / 4 + 23 / 4) / 2


@pytest.mark.usefixtures("untyped")
def test_evaluation_sums_the_assignments_that_layers_and_devices_dropped():
    model = that_tells(dropped=jnp.array([[[1.0, 2.0]], [[0.0, 4.0]]]))
    assert next_token_losses(model, complete_batch(jnp.ones((2, 4), jnp.int32)))[1] == 7


@pytest.mark.parametrize("scope", ["global", "micro_batch", "sequence"])
def test_an_even_router_has_a_balance_loss_of_one(scope):
    _, params = without_mtp()
    even = with_router(params, jnp.zeros_like)
    got, _ = balance(scope)(even, make_batch(), jnp.zeros((2, E)))
    np.testing.assert_allclose(got, 1, rtol=1e-6)


def test_the_balance_loss_alone_evens_out_a_skewed_router():
    graph, params = without_mtp()
    batch = make_batch()

    def balance_loss(params):
        metrics = q3n.loss(nnx.merge(graph, params), batch)[1]
        return metrics["balance_loss"], metrics["assignments"]

    f = quick_jit(jax.value_and_grad(balance_loss, has_aux=True))
    # All routers prefer the same few experts: their columns point where the hidden states do.
    skewed = with_router(params, lambda r: r.at[..., :3].add(0.3 * r[..., :1]))

    def spread(assignments):
        return (assignments.std(-1) / assignments.mean(-1)).max()

    history = []
    for _ in range(30):
        (value, assignments), grads = f(skewed)
        history.append((value, spread(assignments)))
        slopes = dict(nnx.to_flat_state(grads))
        assert all(np.abs(g[...]).max() > 0 for path, g in slopes.items() if path[-1] == "router")
        flat = [
            (path, p.replace(p[...] - 0.5 * slopes[path][...]) if path[-1] == "router" else p)
            for path, p in nnx.to_flat_state(skewed)
        ]
        skewed = nnx.from_flat_state(flat)
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < 0.6 * history[0][1]


def test_evaluation_takes_the_next_token_alone_whatever_the_chunk():
    graph, params = with_mtp()
    batch = make_batch()
    logits = quick_jit(lambda p, b: nnx.merge(graph, p)(b["tokens"], b["segment_ids"]))(
        params, batch
    )
    losses = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)).flatten(0, 1),
        torch.tensor(np.asarray(batch["targets"])).long().flatten(),
        reduction="none",
    )
    want = losses.reshape(4, 20).numpy() * np.asarray(batch["loss_weights"])
    for chunk in (3, 512):
        got, dropped = quick_jit(
            lambda p, b, chunk=chunk: next_token_losses(nnx.merge(graph, p), b, chunk=chunk)
        )(params, batch)
        assert dropped == 0
        np.testing.assert_allclose(got, want, atol=1e-5)  # losses of size 4 in float32
        np.testing.assert_allclose(got.sum() / LABELS, metrics()["ce"], rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "segment_ids", "message"),
    [
        (jnp.ones(3, jnp.int32), None, r"tokens is of shape \[3\]; expected an array \[B, T\]"),
        ([[1, 2]], None, r"tokens is a list; expected an array \[B, T\]"),
        (jnp.ones((1, 3)), None, "tokens is of float32; expected integers"),
        (jnp.array([[1, -100]]), None, "tokens holds -100; expected ids of at least 0"),
        (
            jnp.ones((1, 3), jnp.int32),
            jnp.ones((1, 2), jnp.int32),
            r"segment_ids is of .* \[1, 2\]",
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_is_no_rows_of_tokens_makes_no_batch(tokens, segment_ids, message):
    with pytest.raises(ValueError, match=message):
        complete_batch(tokens, segment_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": None}, "The batch lacks positions; `complete_batch` makes all from tokens"),
        ({"loss_weights": jnp.ones((2, 3))}, r"loss_weights is of shape \[2, 3\]; expected an .*2"),
    ],
)
def test_what_is_no_whole_batch_has_no_loss(change, message):
    model = random_model(small_config())
    batch = complete_batch(jnp.ones((2, 4), jnp.int32)) | change
    with pytest.raises(ValueError, match=message):
        q3n.loss(model, {name: x for name, x in batch.items() if x is not None})


@pytest.mark.usefixtures("untyped")
def test_tokens_alone_are_no_batch_and_floats_no_tokens():
    model = random_model(small_config())
    with pytest.raises(ValueError, match=r"The batch is a .*; `complete_batch` makes a whole one"):
        q3n.loss(model, jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="tokens is of float32; expected integers"):
        model(jnp.ones((2, 4)))


def test_with_64_bits_the_loss_and_its_terms_stay_of_32():
    graph, params = with_mtp()
    with jax.enable_x64(True):
        value, metrics = jax.eval_shape(
            lambda p, b: q3n.loss(nnx.merge(graph, p), b), params, make_batch()
        )
    assert {x.dtype.name for x in jax.tree.leaves((value, metrics))} == {"float32"}


@pytest.mark.usefixtures("untyped")
def test_batches_of_bytes_hold_ids_and_labels_are_counted_in_float32():
    tokens = jnp.asarray(np.frombuffer(b"of bytes", np.uint8)[None])
    batch = complete_batch(tokens, jnp.full(tokens.shape, 255, jnp.uint8))
    assert {x.dtype.name for x in batch.values()} == {"int32", "float32"}
    np.testing.assert_array_equal(batch["targets"][0, :-1], tokens[0, 1:])

    rows = complete_batch(jnp.zeros((8, 700), jnp.int32))  # bfloat16 has no 5592
    rows["loss_weights"] = rows["loss_weights"].astype(jnp.bfloat16)
    counts = count_labels(rows, 1)
    assert (counts.ce, counts.mtp.tolist()) == (8 * 699, [8 * 698])


def test_labels_of_weights_below_1_are_counted_by_their_weights_also_ahead():
    batch = complete_batch(jnp.arange(8)[None])
    weights = 2.0**-12 * jnp.arange(1.0, 9)[None]
    counts = count_labels({**batch, "loss_weights": weights * batch["loss_weights"]}, 1)
    # Sums of a few small integers over a power of two, which are exact.
    assert counts.ce == weights[0, :7].sum()
    assert counts.mtp.tolist() == [weights[0, 1:7].sum()]
