"""The mixers' ops on a mesh, with rows of the batch, tokens and heads sharded over its axes.

Each function takes what the op of the same name takes (`causal_conv` channels in heads, and no
`implementation`), and is that op without a mesh. On a mesh it runs the op on each device's shards,
under `shard_map`. Rows of the batch and heads are independent of each other. Tokens are not: rank r
of the `context` axis holds the r-th contiguous stretch of every row, and ranks communicate:

- *Convolution*: each rank receives the W − 1 inputs before its stretch from the previous rank.
- *Delta rule*: a stretch maps its incoming state S to M S + B. Ranks compose these maps in log₂
  steps of `ppermute` (a rank holds the composition of the 1, 2, 4, ... stretches before it), so the
  size of a message and a rank's memory do not depend on the number of ranks. Gradients of the
  states flow back the same way, through Mᵀ. `ops/delta_rule.py` has the mathematics.
- *Attention*: keys and values travel around the ring of ranks, and each rank accumulates a running
  softmax over those that arrive. In the backward pass they travel once more together with their
  gradients, and the last hop returns the gradients to their ranks. A rank holds two ranks' keys and
  values at a time, whatever the number of ranks.

A causal ring over contiguous stretches would wait for the last rank, which attends to all others
while the first attends to none: nearly twice the mean time. So attention first redistributes the
row: it is split into 2n pieces, and two `ppermute`s move pieces r and 2n − 1 − r to rank r; outputs
return the same way. Then all ranks have equal work at every hop: the late piece attends to the
whole arriving early piece, and so does either the early piece to the arriving early one (if that
comes from a rank before) or the late piece to the arriving late one (from a rank after). The delta
rule needs contiguous stretches, so each attention layer redistributes queries, keys, values and
outputs once, which is cheap compared with the half of attention that it saves. An all-to-all over
heads would be balanced as well, but with two KV heads each rank would hold one head's keys of the
whole row, and this memory does not shrink as the axis grows.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen3next_jax import ops
from qwen3next_jax.config import LINEAR, ModelConfig
from qwen3next_jax.ops.attention import (
    accumulate,
    accumulate_gradients,
    causal_pairs,
    finalize,
    init_carry,
    join_blocks,
    out_dot,
    split_blocks,
)
from qwen3next_jax.ops.attention import (
    default_implementation as default_attention,
)
from qwen3next_jax.ops.delta_rule import (
    default_implementation as default_delta_rule,
)
from qwen3next_jax.ops.delta_rule import (
    gated_delta_rule_stretch,
)
from qwen3next_jax.ops.expert_mlp import default_implementation as default_expert_mlp
from qwen3next_jax.ops.grouped_matmul import row_alignment
from qwen3next_jax.ops.pallas import attention_blocks
from qwen3next_jax.ops.platform import check_implementation, platform
from qwen3next_jax.parallel.mesh import ROWS, active_mesh, partition

_AXIS = "context"
_TOKENS = P(ROWS, _AXIS)  # [B, T, ...]
_HEADS = P(ROWS, _AXIS, "tensor")  # [B, T, heads, ...]


def causal_conv(
    x: Float[Array, "B T N H"],
    kernel: Float[Array, "W N H"],
    *,
    activation: str | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    tail: Float[Array, "B L N H"] | None = None,
) -> Float[Array, "B T N H"]:
    """Applies `ops.causal_conv` to channels in heads [N, H], on the mesh.

    Args:
      x, kernel, activation, segment_ids, tail: arguments of `ops.causal_conv`.

    Returns:
      Outputs in x's dtype.

    Raises:
      ValueError: besides the op's reasons, if the mesh does not divide the rows or the tokens, or a
        stretch is shorter than W − 1 tokens.
    """
    mesh, conv = active_mesh(), functools.partial(ops.causal_conv, activation=activation)
    if mesh is None:
        return conv(x, kernel, segment_ids=segment_ids, tail=tail)
    _check_rows(x, mesh.shape)
    _check_tokens(x.shape[1], mesh.shape[_AXIS], at_least=kernel.shape[0] - 1)

    def local(x, kernel, segments, tail):
        if mesh.shape[_AXIS] == 1:
            return conv(x, kernel, segment_ids=segments, tail=tail)
        L = kernel.shape[0] - 1
        before = _from_before(x[:, x.shape[1] - L :])
        if tail is not None:
            before = jnp.where(_rank() == 0, tail.astype(x.dtype), before)
        if segments is not None:
            # On rank 0 these inputs are the tail, of the first token's document, or zeros.
            ids = _from_before(segments[:, segments.shape[1] - L :])
            ids = jnp.where(_rank() == 0, segments[:, :1], ids)
            segments = jnp.concatenate([ids, segments], axis=1)
        x = jnp.concatenate([before, x], axis=1)
        return conv(x, kernel, segment_ids=segments)[:, L:]

    tail_spec = P(ROWS, None, "tensor")
    specs = (_HEADS, P(None, "tensor"), _TOKENS, tail_spec)
    return _shard_map(local, specs, _HEADS)(x, kernel, segment_ids, tail)


def gated_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N P"],
    *,
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H P"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Applies `ops.gated_delta_rule`, with the same arguments and results, on the mesh.

    Raises:
      ValueError: besides the op's reasons, if the mesh does not divide the rows or the tokens.
    """
    mesh = active_mesh()
    ways = 1 if mesh is None else mesh.shape[_AXIS]

    def local(q, k, v, log_decay, beta, segments, state):
        given: dict[str, Any] = dict(
            log_decay=log_decay, beta=beta, segment_ids=segments, implementation=implementation
        )
        if ways == 1:
            return ops.gated_delta_rule(q, k, v, **given, initial_state=state)
        if state is not None:
            state = jnp.where(_rank() == 0, state, 0)
        out, final = gated_delta_rule_stretch(
            q, k, v, **given, initial_state=state, scan=_scan_stretches
        )
        return out, jax.lax.psum(jnp.where(_rank() == ways - 1, final, 0), _AXIS)

    arrays = q, k, v, log_decay, beta, segment_ids, initial_state
    if mesh is None:
        return local(*arrays)
    _check_rows(q, mesh.shape)
    _check_tokens(q.shape[1], ways)
    state_spec = P(ROWS, "tensor")
    specs = (_HEADS,) * 5 + (_TOKENS, state_spec)
    return _shard_map(local, specs, (_HEADS, state_spec))(*arrays)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K P"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N P"]:
    """Applies `ops.attention`, with the same arguments and results, on the mesh.

    If there are fewer KV heads than devices along `tensor`, the KV heads are replicated.

    Raises:
      ValueError: besides the op's reasons, if the mesh does not divide the rows or heads; or tokens
        are sharded and their number is not divisible by twice the axis, or the implementation is
        neither "chunked" nor "pallas".
    """
    mesh = active_mesh()
    if mesh is None:
        return ops.attention(q, k, v, segment_ids=segment_ids, implementation=implementation)
    ways, tensor = mesh.shape[_AXIS], mesh.shape["tensor"]
    K, whole = k.shape[2], k.shape[2] % mesh.shape["tensor"] != 0
    if whole and tensor % K:
        raise ValueError(
            f"{K} KV heads can neither be split nor repeated over mesh axis tensor={tensor}; "
            f"choose a divisor or a multiple of {K}"
        )
    _check_rows(q, mesh.shape)
    _check_tokens(q.shape[1], ways, halves=True)
    if ways > 1:
        implementation = _ring_implementation(implementation, ways)

    def local(q, k, v, segments):
        if whole:  # select the KV head of this device's query heads
            head = jax.lax.axis_index("tensor") * K // tensor
            k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
        if ways == 1:
            return ops.attention(q, k, v, segment_ids=segments, implementation=implementation)
        if segments is None:
            segments = jnp.zeros(q.shape[:2], jnp.int32)
        B, T, N, H = q.shape
        q = q.reshape(B, T, k.shape[2], -1, H)
        pieces = (_to_pieces(x, ways) for x in (q, k, v, segments))
        block = attention_blocks.BLOCK if implementation == "pallas" else None
        q, k, v, segments = (_split_halves(x, block) for x in pieces)
        out = _ring(ways, implementation, q, k, v, segments)
        out = _from_pieces(_join_halves(out, T // 2), ways)
        return out.reshape(B, T, N, -1)

    kv = P(ROWS, _AXIS) if whole else _HEADS
    return _shard_map(local, (_HEADS, kv, kv, _TOKENS), _HEADS)(q, k, v, segment_ids)


def implementations(
    config: ModelConfig, mesh: Mesh | AbstractMesh, *, rows: int, tokens: int, dtype: jnp.dtype
) -> dict[str, str]:
    """Determines which implementations of the ops a model uses.

    Args:
      config: config of the model.
      mesh: mesh on which the model runs.
      rows: number of rows of a micro-batch.
      tokens: number of tokens of a row.
      dtype: dtype of the activations.

    Returns:
      The implementation's name by the op's name.
    """
    sizes = config.linear_key_head_dim, config.linear_value_head_dim
    ways, head = mesh.shape[_AXIS], config.head_dim
    names = {
        "attention": _ring_implementation(None, ways)
        if ways > 1
        else default_attention(tokens, head, head, dtype)
    }
    if LINEAR in config.mixers:
        names["delta rule"] = default_delta_rule(*sizes, dtype)
    if E := config.num_experts:
        # As `SparseMoE` calls it, on a device's columns of the experts' matrices.
        most = rows * tokens // (mesh.shape["data"] * mesh.shape["fsdp"] * ways)
        block = row_alignment(mean=most * config.num_experts_per_tok / E, most=most)
        width = config.moe_intermediate_size // mesh.shape["tensor"]
        names["experts"] = default_expert_mlp(config.hidden_size, width, dtype, block)
    return names


def _shard_map(local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    # The ops' loops start from constants, which the check of varying manual axes would refuse.
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _check_rows(x: Array, sizes: Mapping[str, int]) -> None:
    partition("An activation", ("batch",), (len(x),), sizes)


def _check_tokens(tokens: int, ways: int, *, at_least: int = 1, halves: bool = False) -> None:
    multiple = 2 * ways if halves and ways > 1 else ways
    if tokens % multiple or tokens // ways < at_least:
        need = max(multiple, -(-at_least * ways // multiple) * multiple)
        raise ValueError(
            f"{tokens} tokens cannot be split over mesh axis context={ways}; choose a multiple of "
            f"{multiple}, at least {need}"
        )


def _ring_implementation(implementation: str | None, ways: int) -> str:
    """Returns the implementation of attention between stretches; None: the platform's default."""
    if implementation is None:
        return "pallas" if platform() == "tpu" else "chunked"
    if implementation not in _BLOCKS:
        raise ValueError(
            f"{implementation=} needs whole rows, but they are split over mesh axis context="
            f"{ways}; use {' or '.join(map(repr, _BLOCKS))}"
        )
    check_implementation(implementation, *_BLOCKS)
    return implementation


def _rank() -> Array:
    return jax.lax.axis_index(_AXIS)


def _from_before(x: Any, distance: int = 1, *, reverse: bool = False) -> Any:
    """Receives x from the rank `distance` before this one (`reverse`: after); zeros without one."""
    ways = jax.lax.axis_size(_AXIS)
    pairs = [(r, r + distance) for r in range(ways - distance)]
    return jax.lax.ppermute(x, _AXIS, [(b, a) for a, b in pairs] if reverse else pairs)


def _around(x: Any) -> Any:
    """Receives x from the previous rank of the ring; rank 0 receives from the last rank."""
    ways = jax.lax.axis_size(_AXIS)
    return jax.lax.ppermute(x, _AXIS, [(r, (r + 1) % ways) for r in range(ways)])


def _scan_stretches(combine: Callable, x: Any, *, reverse: bool = False) -> Any:
    """The `scan` of `ops.delta_rule.gated_delta_rule_stretch`, in log₂ steps."""
    x = _from_before(x, reverse=reverse)
    combined = 1  # number of stretches before this rank's that x combines
    while combined < jax.lax.axis_size(_AXIS) - 1:
        x = combine(_from_before(x, combined, reverse=reverse), x)
        combined *= 2
    return x


def _piece_moves(ways: int) -> list[list[tuple[int, int]]]:
    """Pairs (source, destination) for the first and for the second halves of the stretches.

    Piece c, of rank c // 2, goes to rank min(c, 2n − 1 − c).
    """
    return [[(c // 2, min(c, 2 * ways - 1 - c)) for c in range(h, 2 * ways, 2)] for h in (0, 1)]


def _to_pieces(x, ways):
    """This rank's stretch [B, T, ...] → its early and its late piece for attention."""
    halves = jnp.split(x, 2, axis=1)
    # Pieces with an even number, first halves, become the early piece of even ranks and the late
    # piece of odd ranks.
    first, second = (
        jax.lax.ppermute(half, _AXIS, pairs)
        for half, pairs in zip(halves, _piece_moves(ways), strict=True)
    )
    even = _rank() % 2 == 0
    return jnp.where(even, first, second), jnp.where(even, second, first)


def _from_pieces(pieces, ways):
    """The inverse of `_to_pieces`."""
    early, late = pieces
    even = _rank() % 2 == 0
    halves = jnp.where(even, early, late), jnp.where(even, late, early)
    return jnp.concatenate(
        [
            jax.lax.ppermute(half, _AXIS, [(b, a) for a, b in pairs])
            for half, pairs in zip(halves, _piece_moves(ways), strict=True)
        ],
        axis=1,
    )


def _split_halves(pieces, block):
    """Blocks [Z, B, ...] of the early piece, then as many of the late one."""
    return jnp.concatenate([split_blocks(x, block) for x in pieces])


def _join_halves(x, tokens):
    return tuple(join_blocks(half, tokens) for half in jnp.split(x, 2))


# Blocks below have the shapes of ops/attention.py: q [Z B K R C H], out [Z B K R C P],
# k [Z B K C H], v [Z B K C P], segments [Z B C]. The first half of the Z blocks is the early piece,
# the second half the late one.


# `accumulate` and `accumulate_gradients` by the implementation's name.
_BLOCKS: dict[str, tuple[Callable, Callable]] = {
    "chunked": (accumulate, accumulate_gradients),
    "pallas": (attention_blocks.accumulate, attention_blocks.accumulate_gradients),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(ways, implementation, q, k, v, segments):
    return _ring_forward(ways, implementation, q, k, v, segments)[0]


def _ring_forward(ways, implementation, q, k, v, segments):
    add, _ = _BLOCKS[implementation]

    def hop(state, number):
        carry, arrived = state
        following = _around(arrived)  # overlaps with the products
        k, v, k_segments = arrived
        pairs = _visible_pairs(number, len(q))
        carry = add(carry, q, k, v, segments, k_segments, pairs, causal=False)
        return (carry, following), None

    arrived = _around((k, v, segments))
    own = causal_pairs(len(q))
    carry = init_carry(q, v)
    carry = add(carry, q, k, v, segments, segments, own, causal=True)
    (carry, _), _ = jax.lax.scan(hop, (carry, arrived), jnp.arange(1, ways))
    out, lse = finalize(carry, v.dtype)
    return out, (q, k, v, segments, out, lse)


def _ring_backward(ways, implementation, residuals, d_out):
    q, k, v, segments, out, lse = residuals
    _, add_gradients = _BLOCKS[implementation]
    delta = out_dot(out, d_out)

    def gradients(d_q, k, v, k_segments, pairs, causal):
        return add_gradients(
            d_q, q, k, v, segments, k_segments, lse, delta, d_out, pairs, causal=causal
        )

    def hop(state, number):
        d_q, d_kv, arrived = state
        following, d_kv = _around((arrived, d_kv))
        k, v, k_segments = arrived
        d_q, *added = gradients(d_q, k, v, k_segments, _visible_pairs(number, len(q)), False)
        # The gradients that these keys and values accumulated on other ranks arrived with them.
        return (d_q, jax.tree.map(jnp.add, d_kv, tuple(added)), following), None

    arrived = _around((k, v, segments))
    own = causal_pairs(len(q))
    d_q, *d_kv = gradients(jnp.zeros(q.shape, jnp.float32), k, v, segments, own, True)
    hops = jnp.arange(1, ways)
    (d_q, d_kv, _), _ = jax.lax.scan(hop, (d_q, tuple(d_kv), arrived), hops)
    grads = d_q, *_around(d_kv)  # the last hop returns them to the rank of their keys and values
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_ring.defvjp(_ring_forward, _ring_backward)


def _visible_pairs(hop, number):
    """Pairs of a query block and an arriving key block whose queries attend to all of the keys.

    At rank r, hop h brings the pieces of rank r − h (modulo n). The late piece of any rank comes
    after the early piece of every rank. Among pieces of the same kind, early attends to early if
    the arriving one is from a rank before this one, else late attends to late.

    Args:
      hop: number of hops, from 1.
      number: number of blocks of both pieces together.

    Returns:
      Block indices of queries and of keys.
    """
    half = number // 2
    i, j = (x.reshape(-1).astype(np.int32) for x in np.indices((half, half)))
    offset = (hop > _rank()).astype(jnp.int32) * half  # `half` if a rank after this one sent them
    return jnp.concatenate([half + i, offset + i]), jnp.concatenate([j, offset + j])
