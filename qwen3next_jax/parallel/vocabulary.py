"""The two ends of a model that know every token, on a mesh: embedding and cross-entropy.

At a vocabulary of 151936 both tables are large, and logits far larger. Neither logits nor whole
gradients of a table ever exist here: the tables are stored in slices, put together in the
activations' dtype where they are used, columns of `tensor` excepted, and each device's part of
their gradients is summed in float32 and cut into slices at once. Over `tensor`, each device looks
up, or normalises, the tokens of its own stretch of the vocabulary; what they have to tell each
other are maxima and sums of the softmax, one number a position.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops import cross_entropy as cross_entropy_op
from qwen3next_jax.ops.cross_entropy import (
    losses_and_gradients,
    losses_and_margins,
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
    """Looks tokens up, in the given dtype; gradients are summed in float32."""
    mesh = active_mesh()
    if mesh is None:
        return _look_up_alone(tokens, table, jnp.dtype(dtype))
    spec = partition("embed_tokens", ("vocab", "embed"), table.shape, mesh.shape)
    tokens_spec = partition("tokens", ("batch", "tokens"), tokens.shape, mesh.shape)

    def look_up(tokens, table):
        return _look_up(tokens, table, spec, jnp.dtype(dtype))

    # In float32, so that shard_map's sum over `data` is.
    return jax.shard_map(
        look_up, in_specs=(tokens_spec, spec), out_specs=tokens_spec, check_vma=False
    )(tokens, table.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up_alone(tokens, table, dtype):
    return table[tokens].astype(dtype)


def _look_up_alone_backward(dtype, residuals, grad):
    tokens, table = residuals
    # In bfloat16, a token that comes often would stop counting at the 256th time.
    whole = jnp.zeros(table.shape, jnp.float32).at[tokens].add(grad.astype(jnp.float32))
    return None, whole.astype(table.dtype)


_look_up_alone.defvjp(
    # By plain code, which can be differentiated once more.
    lambda tokens, table, dtype: (table[tokens].astype(dtype), (tokens, table)),
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
    # Each device of `tensor` is handed a part of the result's gradient only: see `sum_columns`.
    grad = grad.astype(jnp.float32) * jax.lax.axis_size("tensor")
    whole = jnp.zeros((len(table), grad.shape[-1]), jnp.float32)
    whole = whole.at[index].add(jnp.where(here[..., None], grad, 0))
    # Over `data`, which the table's spec does not mention, shard_map sums.
    return None, scatter_slices(whole, spec).astype(table.dtype)


_look_up.defvjp(
    lambda tokens, table, spec, dtype: (_look_up(tokens, table, spec, dtype), (tokens, table)),
    _look_up_backward,
)


def _own(tokens, size):
    """Tokens as indices into this device's stretch of the vocabulary, and which lie there."""
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
    """`ops.cross_entropy` on the mesh in use; `chunk` positions of each device's stretch of a row.

    Args, returns: as there.
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
        # Where a sum is made on all devices and then cut, as on whole TPU tori, the cut would
        # otherwise be put off until the update, and the whole sum kept while layers need memory.
        d_head = jax.lax.optimization_barrier(scatter_slices(d_head, spec))
        d_head = jax.lax.psum(d_head, "data").astype(shard.dtype)
        return jax.lax.psum(total, (*ROWS, "context")), losses, d_hidden, d_head

    names = ("total", "losses", "hidden", "head")
    total, losses, *grads = _everywhere(losses, (hidden, head, targets, weights), names)
    return (total, losses), grads


def _backward(chunk, residuals, cotangents):
    d_hidden, d_head = ((cotangents[0] * x).astype(x.dtype) for x in residuals)
    return d_hidden, d_head, None, None


_cross_entropy.defvjp(_forward, _backward)


def token_scores(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 512,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`ops.cross_entropy.losses_and_margins` on the mesh in use; `chunk` as in `cross_entropy`."""
    if active_mesh() is None:
        return losses_and_margins(hidden, head, targets, chunk=chunk)

    def scores(hidden, head, targets, spec):
        head = gather_slices(head.astype(hidden.dtype), spec)
        return losses_and_margins(hidden, head, targets, chunk=chunk, vocab_axis="tensor")

    return _everywhere(scores, (hidden, head, targets), ("losses", "margins"))


def _everywhere(function, args, results):
    """Calls a function of hidden, head, targets, ... and the head's spec on each device."""
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
