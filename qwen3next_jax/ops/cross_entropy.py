"""Cross-entropy that never materialises the logits of a whole batch.

With a vocabulary of 151936 the logits of a few thousand tokens would not fit in memory, so only
`chunk` positions of each row have logits at a time. Because the loss weights are known, the forward
pass also computes the gradients of the hidden states and of the head while it has the logits. The
backward pass only multiplies them by the cotangent of the sum.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.cpu import row_max, row_sum
from qwen3next_jax.ops.platform import platform
from qwen3next_jax.ops.shapes import (
    check_rows,
    check_shape,
    pad_to_multiple,
    require_floats,
    require_tokens,
)


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
      targets: token ids in [0, V); any value where the weight is 0.
      weights: loss weight of each position, without gradient.
      chunk: number of positions of each row whose logits are materialised at a time, at least 1.

    Returns:
      The weighted sum, differentiable in hidden and head, and each position's own unweighted loss
      in nats, without gradient. Both float32.

    Raises:
      ValueError: if the shapes do not match, hidden or head is not of a float dtype, hidden holds
        no token, or chunk is less than 1.
    """
    check_shape("head", head, "D", "V")
    # Not by `check_hidden`, which refuses meshes of explicit axes: the loss works on them.
    check_shape("hidden", hidden, "B", "T", head.shape[0])
    B, T, _ = hidden.shape
    require_tokens(B, T)
    require_floats(hidden=hidden, head=head)
    check_rows((B, T), targets=targets)
    check_shape("weights", weights, B, T)
    total, losses = _cross_entropy(hidden, head, targets, weights, chunk)
    return total, jax.lax.stop_gradient(losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, chunk):
    return summed_losses(hidden, head, targets, weights, chunk=chunk)


def summed_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Computes the results of `cross_entropy` without a rule for gradients.

    Args:
      hidden, head, targets, weights, chunk: arguments of `cross_entropy`.
      vocab_axis: mesh axis over which the vocabulary is sharded, inside `shard_map`; head is then
        this device's shard. None: head has the whole vocabulary.

    Returns:
      The weighted sum and each position's unweighted loss in nats, float32; equal on all devices of
      `vocab_axis`.
    """

    def visit(total, piece):
        x, y, w = piece
        losses = _softmax(x, y, head, vocab_axis).losses
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
    """Computes each position's loss and how far its target's logit lies below the largest logit.

    Args:
      hidden, head, targets, chunk: arguments of `cross_entropy`.
      vocab_axis: argument of `summed_losses`.

    Returns:
      Losses in nats, and margins, at least 0; a margin of 0 means that greedy decoding would have
      chosen the target. Both float32.
    """

    def visit(_, piece):
        x, y = piece
        softmax = _softmax(x, y, head, vocab_axis)
        return None, (softmax.losses, softmax.margins)

    _, results = jax.lax.scan(visit, None, _pieces(chunk, hidden, targets))
    losses, margins = (_join(x, hidden.shape[1]) for x in results)
    return losses, margins


def losses_and_gradients(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    vocab_axis: str | None = None,
) -> tuple[
    tuple[Float[Array, ""], Float[Array, "B T"]],
    tuple[Float[Array, "B T D"], Float[Array, "D V"]],
]:
    """Computes the results of `summed_losses` and the gradients of the weighted sum.

    Args:
      hidden, head, targets, weights, chunk: arguments of `cross_entropy`.
      vocab_axis: argument of `summed_losses`.

    Returns:
      (sum, losses) as `summed_losses` returns them, and the sum's gradients: that of hidden in
      hidden's dtype, equal on all devices of `vocab_axis`, and that of head in float32.
    """

    def visit(carry, piece):
        total, d_head = carry
        x, y, w = piece
        losses, one_hot, exps, denominator, _ = _softmax(x, y, head, vocab_axis)
        d_logits = exps * (w / denominator)[..., None] - one_hot * w[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        # Batch and tokens are one axis: XLA:CPU would transpose the logits for a product that sums
        # over two.
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


def scale_gradients(
    chunk: int,
    gradients: Sequence[Array],
    cotangents: Sequence[Array],
) -> tuple[Float[Array, "B T D"], Float[Array, "D V"], None, None]:
    """The backward rule of `cross_entropy`, whose forward pass already has the gradients.

    Args:
      chunk: not used; the rule receives it as a non-differentiable argument.
      gradients: gradients [B, T, D] and [D, V] of the weighted sum, for hidden and head.
      cotangents: cotangents of the weighted sum, a scalar, and of the losses, which is not used.

    Returns:
      Gradients of hidden and head, in the dtypes of `gradients`; None for targets and weights.
    """
    d_hidden, d_head = ((cotangents[0] * x.astype(jnp.float32)).astype(x.dtype) for x in gradients)
    return d_hidden, d_head, None, None


_cross_entropy.defvjp(_forward, scale_gradients)


class _Softmax(NamedTuple):
    """The softmax over the vocabulary at each position, unnormalised; all float32."""

    losses: Float[Array, "B T"]
    one_hot: Float[Array, "B T V"]  # targets; zero where another device's shard holds the target
    exps: Float[Array, "B T V"]  # exp(logits − their maximum)
    denominator: Float[Array, "B T"]  # sum of exps over the whole vocabulary
    margins: Float[Array, "B T"]  # largest logit minus the target's


def _softmax(hidden, targets, head, vocab_axis):
    logits = jnp.einsum(
        "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    largest = row_max(logits)
    targets = targets.astype(jnp.int32)  # `one_hot` numbers the vocabulary in the targets' dtype
    if vocab_axis is not None:
        largest = jax.lax.pmax(largest, vocab_axis)
        targets = targets - head.shape[1] * jax.lax.axis_index(vocab_axis)
    exps = jnp.exp(logits - largest[..., None])
    one_hot = jax.nn.one_hot(targets, head.shape[1], dtype=jnp.float32)
    denominator, target_logits = row_sum(exps), _at_targets(logits, targets, one_hot)
    if vocab_axis is not None:
        denominator, target_logits = jax.lax.psum((denominator, target_logits), vocab_axis)
    lse = jnp.log(denominator) + largest
    return _Softmax(
        losses=lse - target_logits,
        one_hot=one_hot,
        exps=exps,
        denominator=denominator,
        margins=largest - target_logits,
    )


def _at_targets(logits, targets, one_hot):
    """The targets' logits [B, T]; 0 where another device's shard holds the target."""
    if platform() != "cpu":
        return (logits * one_hot).sum(-1)
    # A CPU reads one entry of each row, where the sum would read all of them again.
    held = (targets >= 0) & (targets < logits.shape[-1])
    index = jnp.where(held, targets, 0)[..., None]
    at = jnp.take_along_axis(logits, index, axis=-1, mode="promise_in_bounds")
    return jnp.where(held, at[..., 0], 0)


def _pieces(chunk, *arrays):
    """[B, T, ...] → [pieces, B, chunk, ...], padded with zeros; weights are zero there, too."""
    B, T = arrays[0].shape[:2]
    require_tokens(B, T)
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")
    chunk = min(chunk, T)

    def split(x):
        x = pad_to_multiple(x, chunk)
        return jnp.moveaxis(x.reshape(len(x), -1, chunk, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays)


def _join(pieces, T):
    x = jnp.moveaxis(pieces, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :T]
