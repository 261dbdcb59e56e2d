"""Short causal convolution, one filter a channel: each token mixes with the few before it.

    y_t = Σ_w kernel[w] x_{t − (W − 1) + w},   over taps in t's own document

"shifted" is W shifted multiply-adds, which compilers fuse into one pass over the activations; a
convolution primitive would be slower for depthwise filters of four taps. "pallas" are kernels for
TPUs, where XLA would make several passes over the activations (`pallas/causal_conv.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.cpu import once
from qwen3next_jax.ops.pallas import causal_conv as kernels
from qwen3next_jax.ops.platform import check_implementation, platform
from qwen3next_jax.ops.shapes import check_rows, check_shape, require_floats, require_tokens


def default_implementation(taps: int, channels: tuple[int, ...]) -> str:
    """Returns the best implementation for this platform, filter length and shape of channels."""
    fits = len(channels) == 2 and kernels.can_compile(taps, channels[-1])
    return "pallas" if platform() == "tpu" and fits else "shifted"


def causal_conv(
    x: Float[Array, "B T *C"],
    kernel: Float[Array, "W *C"],
    *,
    activation: str | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    tail: Float[Array, "B L *C"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T *C"]:
    """Convolves along T.

    Args:
      x: inputs, with any channel axes after T.
      kernel: taps, oldest first.
      activation: function applied to the sums, "silu" or None.
      segment_ids: ids of documents packed in a row; taps do not cross document boundaries.
      tail: the L = W − 1 inputs before x, of the same document as x's first token; zeros when None.
      implementation: "shifted", or "pallas" for channels [N, H] without a tail. None: the
        platform's default.

    Returns:
      Outputs in x's dtype; sums and activation are computed in float32.

    Raises:
      ValueError: if shapes do not match, x has no tokens, arrays are not of floats, the activation
        is unknown, or the implementation is unknown or does not support this platform or these
        arrays.
    """
    if getattr(x, "ndim", 0) < 3:
        raise ValueError(
            f"x is of shape {list(getattr(x, 'shape', ()))}; expected an array [B, T, channels...]"
        )
    require_tokens(*x.shape[:2])
    taps = getattr(kernel, "shape", ())[:1] or ("W",)
    check_shape("kernel", kernel, *taps, *x.shape[2:])
    W = kernel.shape[0]
    if not W:
        raise ValueError("The kernel has 0 taps; expected at least 1")
    require_floats(x=x, kernel=kernel)
    check_rows(x.shape[:2], segment_ids=segment_ids)
    if activation not in (None, "silu"):
        raise ValueError(f"{activation=} is unknown; expected 'silu' or None")
    if tail is not None:
        if getattr(tail, "ndim", 0) == x.ndim and tail.shape[1] != W - 1:
            raise ValueError(
                f"The tail holds {tail.shape[1]} inputs; a kernel of {W} taps needs {W - 1}"
            )
        check_shape("tail", tail, x.shape[0], W - 1, *x.shape[2:])
    if implementation is None:
        implementation = default_implementation(W, kernel.shape[1:]) if tail is None else "shifted"
    check_implementation(implementation, "shifted", "pallas")
    if implementation == "pallas":
        if tail is not None or kernel.ndim != 3 or not kernels.can_compile(W, kernel.shape[-1]):
            raise ValueError(
                "implementation='pallas' takes x [B, T, N, H] with heads of multiples of 128, "
                f"filters of at most {kernels.MOST_TAPS} taps and no tail; use 'shifted'"
            )
        if segment_ids is None:
            segment_ids = jnp.ones(x.shape[:2], jnp.int32)
        return kernels.causal_conv(x, kernel, segment_ids, activation == "silu")
    if tail is None:
        padded = jnp.pad(x, [(0, 0), (W - 1, 0), *[(0, 0)] * (x.ndim - 2)])
    else:
        padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    return _shifted(padded, jnp.asarray(kernel), segment_ids, activation)


def _activated_sums(padded, kernel, segment_ids, activation):
    total = _sums(padded, kernel, _same_document(segment_ids, len(kernel)))
    return (total if activation is None else jax.nn.silu(total)).astype(padded.dtype)


_shifted = jax.custom_vjp(_activated_sums, nondiff_argnums=(3,))


def _shifted_forward(padded, kernel, segment_ids, activation):
    # Plain code instead of the custom_vjp function, so that it can be differentiated once more.
    out = _activated_sums(padded, kernel, segment_ids, activation)
    return out, (padded, kernel, segment_ids)


def _shifted_backward(activation, residuals, d_out):
    padded, kernel, segment_ids = residuals
    W, T = len(kernel), d_out.shape[1]
    same = _same_document(segment_ids, W)

    def gradient_of_sums(padded, kernel, d_out):
        d_out = d_out.astype(jnp.float32)
        if activation is None:
            return d_out
        return jax.vjp(jax.nn.silu, _sums(padded, kernel, same))[1](d_out)[0]

    # `once`, because each tap reads this gradient twice, for the inputs and for the kernel.
    d_total = once(gradient_of_sums, padded, kernel, d_out)
    d_padded, d_kernel = jnp.zeros(padded.shape, jnp.float32), []
    for w in range(W):
        d_tap = _in_document(d_total, same[w])
        d_kernel.append((d_tap * padded[:, w : w + T].astype(jnp.float32)).sum((0, 1)))
        around = [(0, 0), (w, W - 1 - w), *[(0, 0)] * (padded.ndim - 2)]
        d_padded += jnp.pad(d_tap * _taps(kernel, w, d_tap), around)
    return d_padded.astype(padded.dtype), jnp.stack(d_kernel).astype(kernel.dtype), None


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _sums(padded, kernel, same):
    """The convolution's sums [B, T, *C] in float32, from inputs [B, T + W − 1, *C]."""
    W = len(kernel)
    T = padded.shape[1] - (W - 1)
    total = jnp.zeros((padded.shape[0], T, *padded.shape[2:]), jnp.float32)
    for w in range(W):
        inputs = padded[:, w : w + T].astype(jnp.float32)
        total += _in_document(inputs * _taps(kernel, w, total), same[w])
    return total


def _taps(kernel, w, like):
    # Explicit, so that its transpose is one sum over all leading axes; the one that `*` implies
    # takes XLA:CPU far longer.
    return jnp.broadcast_to(kernel[w].astype(jnp.float32), like.shape)


def _same_document(segment_ids, W):
    """For each tap the mask [B, T] of tokens whose input is of their own document; None: all."""
    if segment_ids is None:
        return [None] * W
    masks = []
    for shift in range(W - 1, 0, -1):
        earlier = jnp.pad(segment_ids, ((0, 0), (shift, 0)), mode="edge")[:, :-shift]
        masks.append(earlier == segment_ids)
    return [*masks, None]


def _in_document(tap, same):
    """A tap [B, T, ...], zeroed where its input is of another document."""
    if same is None:
        return tap
    return jnp.where(same.reshape(*same.shape, *[1] * (tap.ndim - 2)), tap, 0)
