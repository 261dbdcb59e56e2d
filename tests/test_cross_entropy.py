"""Chunked cross-entropy against PyTorch's in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import quick_jit

from qwen3next_jax.ops.cross_entropy import cross_entropy

B, T, D, V = 2, 13, 6, 29


def make():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    weights = rng.choice([0, 0.5, 1], (B, T)).astype(np.float32)
    targets[weights == 0] = V + 7  # what stands there must not matter
    return hidden, head, targets, weights


def float64_cross_entropy(hidden, head, targets, weights):
    hidden, head = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, head)
    )
    losses = torch.nn.functional.cross_entropy(
        (hidden @ head).flatten(0, 1),
        torch.tensor(np.where(weights > 0, targets, 0)).long().flatten(),
        reduction="none",
    ).reshape(B, T)
    total = (losses * torch.tensor(weights)).sum()
    total.backward()
    return total.item(), losses.detach().numpy(), hidden.grad.numpy(), head.grad.numpy()


@pytest.mark.parametrize("chunk", [1, 5, 13, 512])
def test_values_and_gradients_are_those_of_float64_whatever_the_chunk(chunk):
    arrays = make()
    total, losses, d_hidden, d_head = float64_cross_entropy(*arrays)
    hidden, head, targets, weights = (jnp.asarray(x) for x in arrays)

    @quick_jit
    def run(hidden, head):
        def scaled(hidden, head):  # the factor behind the sum must reach the gradients
            total, losses = cross_entropy(hidden, head, targets, weights, chunk=chunk)
            return 3 * total, (total, losses)

        return jax.grad(scaled, argnums=(0, 1), has_aux=True)(hidden, head)

    grads, (got, got_losses) = run(hidden, head)
    # Losses up to 15 in float32, and sums of two dozen of them.
    np.testing.assert_allclose(got, total, rtol=2e-6)
    counted = np.asarray(weights) > 0
    np.testing.assert_allclose(got_losses[counted], losses[counted], atol=5e-6)
    np.testing.assert_allclose(grads[0], 3 * d_hidden, atol=1e-5)
    np.testing.assert_allclose(grads[1], 3 * d_head, atol=1e-5)
    without_gradient = cross_entropy(hidden, head, targets, weights, chunk=chunk)[0]
    np.testing.assert_allclose(without_gradient, total, rtol=2e-6)


def test_large_logits_neither_overflow_nor_lose_their_gradients():
    hidden, head, targets, weights = (jnp.asarray(x) for x in make())
    total, grads = jax.value_and_grad(lambda h: cross_entropy(h, head, targets, weights)[0])(
        1e4 * hidden
    )
    assert np.isfinite(total)
    assert np.isfinite(grads).all()
    assert np.abs(grads).max() > 0.1


@pytest.mark.usefixtures("untyped")
def test_targets_in_bytes_are_the_ids_that_they_hold():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((D, 300)), jnp.float32)  # more than bytes can hold
    targets, weights = rng.integers(0, 256, (B, T)), jnp.ones((B, T))
    want, got = (
        cross_entropy(hidden, head, jnp.asarray(targets, dtype), weights)
        for dtype in (jnp.int32, jnp.uint8)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_bfloat16_hidden_states_get_float32_losses():
    hidden, head, targets, weights = make()
    hidden = np.asarray(jnp.asarray(hidden, jnp.bfloat16), np.float32)
    head = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    total, _, d_hidden, _ = float64_cross_entropy(hidden, head, targets, weights)
    (got, losses), vjp = jax.vjp(
        lambda h: cross_entropy(h, jnp.asarray(head), jnp.asarray(targets), jnp.asarray(weights)),
        jnp.asarray(hidden, jnp.bfloat16),
    )
    (gradient,) = vjp((jnp.ones(()), jnp.zeros((B, T))))
    assert got.dtype == losses.dtype == jnp.float32
    # The products are exact in float32: only the gradients are rounded, to 8 bits.
    np.testing.assert_allclose(got, total, rtol=2e-6)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), d_hidden, atol=0.05)


def test_the_head_s_gradient_is_summed_in_float32_though_hidden_states_are_bfloat16():
    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)

    hidden, head, targets, weights = make()
    hidden, head = rounded(hidden), rounded(head)
    logits = hidden @ head
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.arange(V) == targets[..., None]
    # What goes back through the logits is rounded; sums over tokens are not.
    want = np.einsum("btd,btv->dv", hidden, rounded(weights[..., None] * (softmax - chosen)))
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    gradient = quick_jit(jax.grad(lambda head: cross_entropy(hidden, head, targets, weights)[0]))
    got = gradient(jnp.asarray(head, jnp.float32))
    # A few entries are rounded the other way; sums rounded to 8 bits would be off by 1e-3.
    assert np.linalg.norm(got - want) < 2e-4 * np.linalg.norm(want)


def test_all_is_float32_where_double_precision_is_allowed():
    with jax.enable_x64(True):
        hidden, head, targets, weights = (jnp.asarray(x) for x in make())

        def total(hidden, head):
            return cross_entropy(hidden, head, targets, weights, chunk=5)[0]

        text = str(jax.make_jaxpr(jax.value_and_grad(total, argnums=(0, 1)))(hidden, head))
    assert not re.search(r"f64\[\d", text)  # numbers may be


def test_arrays_that_would_be_broadcast_are_refused(untyped):
    hidden, head, targets, weights = (jnp.asarray(x) for x in make())
    for name, arrays in (
        ("targets", (hidden, head, targets[:1], weights)),
        ("weights", (hidden, head, targets, weights[:1])),
        ("hidden", (hidden[..., :-1], head, targets, weights)),
    ):
        with pytest.raises(ValueError, match=f"{name} is of shape .*; expected an array"):
            cross_entropy(*arrays)


def test_a_cpu_reads_the_logit_of_a_target_and_not_all_of_its_row():
    arrays = [jnp.asarray(x) for x in make()]
    text = quick_jit(lambda *arrays: cross_entropy(*arrays)[0]).lower(*arrays).compile().as_text()
    assert re.search(rf"f32\[{B},{T},{V}\]\S* (dot|subtract)\(", text)  # which the logits are
    assert " gather(" in text
    assert not re.search(rf"f32\[{B},{T},{V}\]\S* multiply\(", text)
