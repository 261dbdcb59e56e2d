"""Cross-entropy that never holds the logits of a whole batch.

With a vocabulary of 151936 the logits of a few thousand tokens would not fit memory, so they exist
for `chunk` positions of each row at a time. The weights are known in the forward pass, so that it
can compute the gradients with respect to the hidden states and the head as well, up to one factor,
while it has the logits; the backward pass only multiplies by the factor.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.cpu import row_max, row_sum
from qwen3next_jax.ops.shapes import require_tokens


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Sums weights · −log softmax(hidden · head)[targets].

    Args:
      hidden: final hidden states.
      head: output embedding.
      targets: tokens in [0, V); any value where the weight is 0.
      weights: of each position, without gradient.
      chunk: positions of each row whose logits exist at a time.

    Returns:
      The weighted sum, differentiable in hidden and head, and each position's own unweighted loss
      in nats, without gradient. Both float32.
    """
    total, losses = _cross_entropy(hidden, head, targets, weights, chunk)
    return total, jax.lax.stop_gradient(losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, chunk):
    return summed_losses(hidden, head, targets, weights, chunk=chunk)


def summed_losses(hidden, head, targets, weights, *, chunk, vocab_axis=None):
    """What `cross_entropy` returns.

    With `vocab_axis`, inside `shard_map`: this device's head holds a stretch of the vocabulary, and
    the others of that mesh axis hold the rest.
    """

    def visit(total, piece):
        x, y, w = piece
        losses, *_ = _losses(x, y, head, vocab_axis)
        return total + (losses * w).sum(), losses

    pieces = _pieces(chunk, hidden, targets, jnp.asarray(weights, jnp.float32))
    total, losses = jax.lax.scan(visit, jnp.zeros((), jnp.float32), pieces)
    return total, _join(losses, hidden.shape[1])


def losses_and_margins(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 512,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Each position's loss in nats, and how far its target's logit lies below the largest.

    A margin of 0 says that greedy decoding would have chosen the target. Both float32, without
    gradient; arguments as in `cross_entropy` and `summed_losses`.
    """

    def visit(_, piece):
        x, y = piece
        losses, *_, margins = _losses(x, y, head, vocab_axis)
        return None, (losses, margins)

    _, found = jax.lax.scan(visit, None, _pieces(chunk, hidden, targets))
    losses, margins = (_join(x, hidden.shape[1]) for x in found)
    return losses, margins


def losses_and_gradients(hidden, head, targets, weights, *, chunk, vocab_axis=None):
    """The same, and the sum's gradients in hidden, in its dtype, and head, in float32."""

    def visit(carry, piece):
        total, d_head = carry
        x, y, w = piece
        losses, chosen, exps, norms, _ = _losses(x, y, head, vocab_axis)
        d_logits = exps * (w / norms)[..., None] - chosen * w[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        # Rows as one axis: where a product sums over two, XLA turns logits around for a CPU first.
        rows, d_rows = (a.reshape(-1, a.shape[-1]) for a in (x, d_logits))
        d_x = jnp.einsum("rv,dv->rd", d_rows, head.astype(hidden.dtype)).reshape(x.shape)
        d_head += jnp.einsum("rd,rv->dv", rows, d_rows, preferred_element_type=jnp.float32)
        return (total + (losses * w).sum(), d_head), (losses, d_x)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    pieces = _pieces(chunk, hidden, targets, jnp.asarray(weights, jnp.float32))
    (total, d_head), (losses, d_hidden) = jax.lax.scan(visit, start, pieces)
    T = hidden.shape[1]
    d_hidden = _join(d_hidden, T)
    if vocab_axis is not None:
        d_hidden = jax.lax.psum(d_hidden, vocab_axis)
    return (total, _join(losses, T)), (d_hidden, d_head)


def _forward(hidden, head, targets, weights, chunk):
    results, (d_hidden, d_head) = losses_and_gradients(hidden, head, targets, weights, chunk=chunk)
    return results, (d_hidden, d_head.astype(head.dtype))


def _backward(chunk, residuals, cotangents):
    d_hidden, d_head = ((cotangents[0] * x).astype(x.dtype) for x in residuals)
    return d_hidden, d_head, None, None


_cross_entropy.defvjp(_forward, _backward)


def _losses(hidden, targets, head, vocab_axis):
    """Losses, the targets as 0s and 1s, the softmax as exponentials and their sums, margins."""
    logits = jnp.einsum(
        "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    peaks = row_max(logits)
    if vocab_axis is not None:
        peaks = jax.lax.pmax(peaks, vocab_axis)
        targets = targets - head.shape[1] * jax.lax.axis_index(vocab_axis)
    exps = jnp.exp(logits - peaks[..., None])
    chosen = jax.nn.one_hot(targets, head.shape[1], dtype=jnp.float32)
    norms, picked = row_sum(exps), row_sum(logits * chosen)
    if vocab_axis is not None:
        norms, picked = jax.lax.psum((norms, picked), vocab_axis)
    return jnp.log(norms) + peaks - picked, chosen, exps, norms, peaks - picked


def _pieces(chunk, *arrays):
    """[B, T, ...] → [pieces, B, chunk, ...], padded with zeros, weights included."""
    B, T = arrays[0].shape[:2]
    require_tokens(B, T)
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")
    chunk = min(chunk, T)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays)


def _join(pieces, T):
    x = jnp.moveaxis(pieces, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :T]
