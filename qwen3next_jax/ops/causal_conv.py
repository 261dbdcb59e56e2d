"""Short causal convolution, one filter a channel: each token mixes with the few before it.

    y_t = Σ_w kernel[w] x_{t − (W − 1) + w},   over taps in t's own document

Written as W shifted multiply-adds, which compilers fuse into one pass over the activations; a
convolution primitive would be slower for depthwise filters of four taps.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
    x: Float[Array, "B T *C"],
    kernel: Float[Array, "W *C"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    tail: Float[Array, "B L *C"] | None = None,
) -> Float[Array, "B T *C"]:
    """Convolves along T.

    Args:
      x: inputs, with any channel axes after T.
      kernel: taps, oldest first.
      segment_ids: documents packed in a row; no tap reaches into another one.
      tail: the L = W − 1 inputs before x, of the same document as x's first token; zeros when None.

    Returns:
      Outputs in x's dtype; sums are in float32.

    Raises:
      ValueError: the tail is of another length.
    """
    W, T = kernel.shape[0], x.shape[1]
    if tail is not None and tail.shape[1] != W - 1:
        raise ValueError(
            f"The tail holds {tail.shape[1]} inputs; a kernel of {W} taps needs {W - 1}"
        )
    padding = [(0, 0)] * (x.ndim - 2)
    if tail is None:
        padded = jnp.pad(x, [(0, 0), (W - 1, 0), *padding])
    else:
        padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    total = jnp.zeros(x.shape, jnp.float32)
    for w in range(W):
        shift = W - 1 - w
        taps = jnp.broadcast_to(kernel[w].astype(jnp.float32), x.shape)  # see `RMSNorm`
        tap = padded[:, w : w + T].astype(jnp.float32) * taps
        if segment_ids is not None and shift:
            earlier = jnp.pad(segment_ids, ((0, 0), (shift, 0)), mode="edge")[:, :T]
            same = (earlier == segment_ids).reshape(*segment_ids.shape, *[1] * (x.ndim - 2))
            tap = jnp.where(same, tap, 0)
        total += tap
    return total.astype(x.dtype)
