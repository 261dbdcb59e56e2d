"""The causal convolution against PyTorch's, document by document, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import segments_of

from qwen3next_jax.ops.causal_conv import causal_conv

SHORT = [(17,), (1, 2, 5, 1, 8)]


def float64_conv(x, kernel):
    """x [B, T, C], kernel [W, C]: a depthwise convolution of one document."""
    W, C = kernel.shape
    padded = torch.nn.functional.pad(x.transpose(1, 2), (W - 1, 0))
    return torch.nn.functional.conv1d(padded, kernel.T[:, None], groups=C).transpose(1, 2)


def float64_documents(x, kernel, d_out, lengths, activation):
    """Outputs and gradients of rows of documents, each convolved by itself."""
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, kernel)]
    flat, taps = tensors[0].flatten(2), tensors[1].flatten(1)
    out = torch.cat([float64_conv(part, taps) for part in flat.split(lengths, dim=1)], dim=1)
    if activation == "silu":
        out = torch.nn.functional.silu(out)
    out.backward(torch.tensor(d_out, dtype=torch.float64).flatten(2))
    return out.detach().reshape(x.shape), *(tensor.grad for tensor in tensors)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("implementation", "W", "lengths", "heads"),
    [
        *(("shifted", W, lengths, (3, 5)) for W in (1, 2, 4) for lengths in SHORT),
        ("pallas", 1, (17,), (3, 128)),
        ("pallas", 4, (1, 2, 5, 1, 8), (3, 128)),
        # Three blocks, documents that end at, just before and just behind a block's end.
        ("pallas", 4, (510, 2, 2, 509, 2), (2, 128)),
        ("pallas", 3, (1030,), (1, 256)),
    ],
)
def test_values_and_gradients_are_those_of_float64_in_each_document(
    implementation, W, lengths, heads, activation
):
    rng, T = np.random.default_rng(0), sum(lengths)
    x = rng.standard_normal((2, T, *heads)).astype(np.float32)
    kernel = rng.standard_normal((W, *heads)).astype(np.float32)
    d_out = rng.standard_normal(x.shape).astype(np.float32)
    want, *gradients = float64_documents(x, kernel, d_out, lengths, activation)

    segments = jnp.asarray(np.repeat(segments_of(*lengths, total=T), 2, axis=0))
    segments = None if len(lengths) == 1 else segments
    given = dict(activation=activation, segment_ids=segments, implementation=implementation)
    out, vjp = jax.vjp(
        lambda x, kernel: causal_conv(x, kernel, **given), jnp.asarray(x), jnp.asarray(kernel)
    )
    # Four products of size 1; the kernel's gradient sums over 34 tokens, or over some 2000.
    np.testing.assert_allclose(out, want, atol=2e-6)
    sums = 1e-5 if T < 100 else 1e-4
    for got, grad, atol in zip(vjp(jnp.asarray(d_out)), gradients, (1e-5, sums), strict=True):
        np.testing.assert_allclose(got, grad, atol=atol)


def test_the_kernels_round_to_bfloat16_once():
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(rng.standard_normal((2, 40, 2, 128)), jnp.bfloat16) for _ in "xd")
    kernel = jnp.asarray(rng.standard_normal((4, 2, 128)), jnp.float32)

    def results(dtype):
        out, vjp = jax.vjp(
            lambda x: causal_conv(x, kernel, activation="silu", implementation="pallas"),
            x.astype(dtype),
        )
        return out, *vjp(d_out.astype(dtype))

    for got, whole in zip(results(jnp.bfloat16), results(jnp.float32), strict=True):
        # Half of the last of 8 bits, and what float32 sums in another order may differ by.
        np.testing.assert_allclose(got.astype(jnp.float32), whole, rtol=2**-8 * 1.01, atol=2e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"activation": "relu"}, "activation='relu' is unknown; expected 'silu' or None"),
        ({"implementation": "fft"}, "implementation='fft' is unknown; expected 'shifted'"),
        ({"implementation": "pallas"}, r"takes x \[B, T, N, H\] with .* and no tail"),
    ],
)
def test_what_it_cannot_do_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        causal_conv(jnp.ones((1, 5, 3)), jnp.ones((4, 3)), **given)


def test_a_tail_goes_on_where_the_last_call_stopped(untyped):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 12, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    whole = causal_conv(x, kernel)
    rest = causal_conv(x[:, 7:], kernel, tail=x[:, 4:7])
    np.testing.assert_array_equal(rest, whole[:, 7:])  # the same products in the same order
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"holds {length} inputs; a kernel of 4 taps needs 3"):
            causal_conv(x, kernel, tail=x[:, :length])
    for tail in (x[:1, :3], x[:, :3, :2]):
        with pytest.raises(ValueError, match=r"tail is of shape .*; expected an array \[2, 3, 5\]"):
            causal_conv(x, kernel, tail=tail)


def test_bfloat16_is_summed_in_float32():
    x = jnp.asarray([[[256.0], [1.0], [1.0], [1.0]]], jnp.bfloat16)
    out = causal_conv(x, jnp.ones((4, 1), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    # In bfloat16 256 + 1 is 256, three times over; the float32 sum 259 rounds to 260.
    assert out[0, 3, 0] == 260
