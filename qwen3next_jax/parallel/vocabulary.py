"""The two ends of a model that depend on the vocabulary, on a mesh: embedding and cross-entropy.

At a vocabulary of 151936 both tables are large, and logits far larger. Neither all logits nor whole
gradients of a table are ever materialised here. The tables are stored in slices and all-gathered in
the activations' dtype where they are used, except over `tensor`; each device's part of their
gradients is summed in float32 and reduce-scattered into slices at once. Over `tensor`, each device
looks up, or normalises, the tokens of its own shard of the vocabulary; the devices exchange only
maxima and sums of the softmax, one number per position.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops import cross_entropy as cross_entropy_op
from qwen3next_jax.ops.cpu import gather
from qwen3next_jax.ops.cross_entropy import (
    losses_and_gradients,
    losses_and_margins,
    scale_gradients,
    summed_losses,
)
from qwen3next_jax.parallel.mesh import (
    ROWS,
    active_mesh,
    gather_slices,
    partition,
    scatter_slices,
)


def embed(
    tokens: Int[Array, "B T"], table: Float[Array, "V D"], *, dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """Looks up tokens in the embedding table, on the mesh in use.

    Args:
      tokens: token ids in [0, V).
      table: embedding table.
      dtype: dtype of the result; gradients are summed in float32.

    Returns:
      Each token's row of the table.
    """
    mesh = active_mesh()
    if mesh is None:
        return _look_up_alone(tokens, table, jnp.dtype(dtype))
    spec = partition("embed_tokens", ("vocab", "embed"), table.shape, mesh.shape)
    tokens_spec = partition("tokens", ("batch", "tokens"), tokens.shape, mesh.shape)

    def look_up(tokens, table):
        return _look_up(tokens, table, spec, jnp.dtype(dtype))

    # The table is float32, so that shard_map sums its gradient over `data` in float32.
    return jax.shard_map(
        look_up, in_specs=(tokens_spec, spec), out_specs=tokens_spec, check_vma=False
    )(tokens, table.astype(jnp.float32))


def _rows_of(tokens, table, dtype):
    return gather(operator.getitem, table, tokens).astype(dtype)


_look_up_alone = jax.custom_vjp(_rows_of, nondiff_argnums=(2,))


def _look_up_alone_backward(dtype, residuals, grad):
    tokens, table = residuals
    # In bfloat16, the sum for a frequent token would stop growing at about 256 occurrences.
    whole = jnp.zeros(table.shape, jnp.float32).at[tokens].add(grad.astype(jnp.float32))
    return None, whole.astype(table.dtype)


_look_up_alone.defvjp(
    # Plain code instead of the custom_vjp function, so that it can be differentiated once more.
    lambda tokens, table, dtype: (_rows_of(tokens, table, dtype), (tokens, table)),
    _look_up_alone_backward,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(tokens, table, spec, dtype):
    whole = gather_slices(table.astype(dtype), spec)
    index, here = _own(tokens, len(whole))
    return jax.lax.psum(jnp.where(here[..., None], whole[index], 0), "tensor")


def _look_up_backward(spec, dtype, residuals, grad):
    tokens, table = residuals
    index, here = _own(tokens, len(table))
    # shard_map gives each device of `tensor` only a share of the gradient; see `sum_columns`.
    grad = grad.astype(jnp.float32) * jax.lax.axis_size("tensor")
    whole = jnp.zeros((len(table), grad.shape[-1]), jnp.float32)
    whole = whole.at[index].add(jnp.where(here[..., None], grad, 0))
    # shard_map itself sums over `data`, which the table's spec does not mention.
    return None, scatter_slices(whole, spec).astype(table.dtype)


_look_up.defvjp(
    lambda tokens, table, spec, dtype: (_look_up(tokens, table, spec, dtype), (tokens, table)),
    _look_up_backward,
)


def _own(tokens, size):
    """Indices of tokens into this device's shard of the vocabulary, and which tokens it holds."""
    index = tokens - size * jax.lax.axis_index("tensor")
    here = (index >= 0) & (index < size)
    return jnp.where(here, index, 0), here


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """`ops.cross_entropy` on the mesh in use, with the same arguments and results.

    `chunk` counts positions of each device's shard of a row.
    """
    if active_mesh() is None:
        return cross_entropy_op(hidden, head, targets, weights, chunk=chunk)
    total, losses = _cross_entropy(hidden, head, targets, weights, chunk)
    return total, jax.lax.stop_gradient(losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, chunk):
    def losses(hidden, head, targets, weights, spec):
        head = gather_slices(head.astype(hidden.dtype), spec)
        total, losses = summed_losses(
            hidden, head, targets, weights, chunk=chunk, vocab_axis="tensor"
        )
        return jax.lax.psum(total, (*ROWS, "context")), losses

    return _everywhere(losses, (hidden, head, targets, weights), ("total", "losses"))


def _forward(hidden, head, targets, weights, chunk):
    def losses(hidden, shard, targets, weights, spec):
        head = gather_slices(shard.astype(hidden.dtype), spec)
        (total, losses), (d_hidden, d_head) = losses_and_gradients(
            hidden, head, targets, weights, chunk=chunk, vocab_axis="tensor"
        )
        # On whole TPU tori the compiler makes an all-reduce and a slice of this reduce-scatter.
        # Without the barrier it delays the slice until the optimizer's update, and the whole sum
        # stays in memory while the layers' backward pass needs it.
        d_head = jax.lax.optimization_barrier(scatter_slices(d_head, spec))
        d_head = jax.lax.psum(d_head, "data").astype(shard.dtype)
        return jax.lax.psum(total, (*ROWS, "context")), losses, d_hidden, d_head

    names = ("total", "losses", "hidden", "head")
    total, losses, *grads = _everywhere(losses, (hidden, head, targets, weights), names)
    return (total, losses), grads


_cross_entropy.defvjp(_forward, scale_gradients)


def token_scores(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 512,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`ops.cross_entropy.losses_and_margins` on the mesh in use, with the same results.

    `chunk` counts positions of each device's shard of a row.
    """
    if active_mesh() is None:
        return losses_and_margins(hidden, head, targets, chunk=chunk)

    def scores(hidden, head, targets, spec):
        head = gather_slices(head.astype(hidden.dtype), spec)
        return losses_and_margins(hidden, head, targets, chunk=chunk, vocab_axis="tensor")

    return _everywhere(scores, (hidden, head, targets), ("losses", "margins"))


def _everywhere(function, args, results):
    """Calls a function of hidden, head, targets, ... and the head's spec under `shard_map`.

    Args:
      function: function of each device's shards, with the keyword `spec` for the head's spec.
      args: global arrays hidden, head, targets and any further ones of the shape of targets.
      results: names of the function's results, which determine their specs.
    """
    hidden, head, targets, *_ = args
    sizes = jax.sharding.get_abstract_mesh().shape
    rows = partition("targets", ("batch", "tokens"), targets.shape, sizes)
    specs = {
        "hidden": partition("hidden", ("batch", "tokens", "hidden"), hidden.shape, sizes),
        "head": partition("lm_head", ("embed", "vocab"), head.shape, sizes),
        "losses": rows,
        "margins": rows,
        "total": PartitionSpec(),
    }
    return jax.shard_map(
        functools.partial(function, spec=specs["head"]),
        in_specs=(specs["hidden"], specs["head"], *(rows for _ in args[2:])),
        out_specs=tuple(specs[name] for name in results),
        check_vma=False,
    )(*args)
