"""The causal convolution against PyTorch's, document by document, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import segments_of

from qwen3next_jax.ops.causal_conv import causal_conv


def float64_conv(x, kernel):
    """x [B, T, C], kernel [W, C]: a depthwise convolution of one document."""
    W, C = kernel.shape
    padded = torch.nn.functional.pad(x.transpose(1, 2), (W - 1, 0))
    return torch.nn.functional.conv1d(padded, kernel.T[:, None], groups=C).transpose(1, 2)


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(17,), (1, 2, 5, 1, 8)])
def test_values_and_gradients_are_those_of_float64_in_each_document(W, lengths):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 17, 3, 5)).astype(np.float32)
    kernel = rng.standard_normal((W, 3, 5)).astype(np.float32)
    d_out = rng.standard_normal(x.shape).astype(np.float32)
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, kernel)]
    flat, taps = tensors[0].flatten(2), tensors[1].flatten(1)
    want = torch.cat([float64_conv(part, taps) for part in flat.split(lengths, dim=1)], dim=1)
    want.backward(torch.tensor(d_out, dtype=torch.float64).flatten(2))

    segments = jnp.asarray(np.repeat(segments_of(*lengths, total=17), 2, axis=0))
    segments = None if len(lengths) == 1 else segments
    out, vjp = jax.vjp(
        lambda x, kernel: causal_conv(x, kernel, segment_ids=segments),
        jnp.asarray(x), jnp.asarray(kernel),
    )  # fmt: skip
    # Four products of size 1; the kernel's gradient sums over 34 tokens.
    np.testing.assert_allclose(out, want.detach().reshape(x.shape), atol=2e-6)
    for got, tensor in zip(vjp(jnp.asarray(d_out)), tensors, strict=True):
        np.testing.assert_allclose(got, tensor.grad, atol=1e-5)


def test_a_tail_goes_on_where_the_last_call_stopped():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 12, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    whole = causal_conv(x, kernel)
    rest = causal_conv(x[:, 7:], kernel, tail=x[:, 4:7])
    np.testing.assert_array_equal(rest, whole[:, 7:])  # the same products in the same order
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"holds {length} inputs; a kernel of 4 taps needs 3"):
            causal_conv(x, kernel, tail=x[:, :length])


def test_bfloat16_is_summed_in_float32():
    x = jnp.asarray([[[256.0], [1.0], [1.0], [1.0]]], jnp.bfloat16)
    out = causal_conv(x, jnp.ones((4, 1), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    # In bfloat16 256 + 1 is 256, three times over; the float32 sum 259 rounds to 260.
    assert out[0, 3, 0] == 260
