"""The mixers' ops on a mesh: rows of the batch, their tokens and heads, each split over its axes.

Each function has the signature of the op of its name and is that op where there is no mesh. On a
mesh it runs the op on each device's part of the arrays, under `shard_map`. Rows of the batch and
heads need nothing from each other; what tokens need lies in contiguous stretches, rank r of the
`context` axis holding the r-th:

- *Convolution*: the W − 1 inputs before the stretch come from the rank before.
- *Delta rule*: a stretch does S → M S + B to the state that comes in. Ranks compose these maps in
  log₂ steps of `ppermute` (a rank holds the composition of the 1, 2, 4, ... stretches before it),
  so what crosses the wire and what a rank holds does not depend on their number. Gradients of the
  states go the same way back, through Mᵀ. `ops/delta_rule.py` has the mathematics.
- *Attention*: keys and values travel around the ring of ranks while each rank adds what it sees to
  a running softmax; backward, they travel once more and their gradients with them, home again.
  A rank holds two ranks' keys and values at a time, whatever the number of ranks.

A causal ring over contiguous stretches would wait for the last rank, which sees all the others
while the first sees none: nearly twice the mean. So attention first deals the row anew: cut in 2n
pieces, rank r gets pieces r and 2n − 1 − r, by two `ppermute`s, and gives the outputs back the same
way. Then each rank has as much to do as any other at every hop: the late piece always sees the
arriving early one, and one more pair is seen whole, of early pieces when they come from before, of
late ones when they come from behind. The recurrence needs contiguous stretches, and dealing costs
queries and outputs one trip each, small beside half of the attention. An all-to-all over heads is
as balanced, but with two KV heads each rank would hold a head's keys of the whole row: memory that
does not fall with the axis.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
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
from qwen3next_jax.ops.grouped_matmul import MOST_ROWS
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
    """`ops.causal_conv` of heads' channels, on the mesh."""
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
            # The tail is of the first token's document; zeros may be of any.
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
    """`ops.gated_delta_rule` on the mesh.

    Raises:
      ValueError: besides the op's, where tokens are split but cannot be: their number is not
        divisible, or the implementation is not "chunked".
    """
    mesh = active_mesh()
    ways = 1 if mesh is None else mesh.shape[_AXIS]

    def local(q, k, v, log_decay, beta, segments, state):
        given = dict(log_decay=log_decay, beta=beta, segment_ids=segments)
        if ways == 1:
            return ops.gated_delta_rule(
                q, k, v, **given, initial_state=state, implementation=implementation
            )
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
    _check_implementation(implementation, ways)
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
    """`ops.attention` on the mesh; KV heads fewer than `tensor` are held whole.

    Raises:
      ValueError: besides the op's, where tokens are split but cannot be: their number is not
        divisible by twice the axis, or the implementation is not "chunked".
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
    _check_implementation(implementation, ways)

    def local(q, k, v, segments):
        if whole:  # the one that this device's query heads look at
            head = jax.lax.axis_index("tensor") * K // tensor
            k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
        if ways == 1:
            return ops.attention(q, k, v, segment_ids=segments, implementation=implementation)
        if segments is None:
            segments = jnp.zeros(q.shape[:2], jnp.int32)
        B, T, N, H = q.shape
        q = q.reshape(B, T, k.shape[2], -1, H)
        q, k, v, segments = (_split_halves(_deal(x, ways)) for x in (q, k, v, segments))
        out = _ring(ways, q, k, v, segments)
        out = _collect(_join_halves(out, T // 2), ways)
        return out.reshape(B, T, N, -1)

    kv = P(ROWS, _AXIS) if whole else _HEADS
    return _shard_map(local, (_HEADS, kv, kv, _TOKENS), _HEADS)(q, k, v, segment_ids)


def implementations(
    config: ModelConfig, mesh: Mesh, tokens: int, dtype: jnp.dtype
) -> dict[str, str]:
    """Which implementations of ops a model takes on a mesh, for rows of so many tokens."""
    sizes = config.linear_key_head_dim, config.linear_value_head_dim
    names = {"attention": default_attention(tokens, config.head_dim, config.head_dim, dtype)}
    if LINEAR in config.mixers:
        names["delta rule"] = default_delta_rule(*sizes, dtype)
    if mesh.shape[_AXIS] > 1:
        names = dict.fromkeys(names, "chunked")
    if config.num_experts:
        names["experts"] = default_expert_mlp(
            config.hidden_size, config.moe_intermediate_size, dtype, MOST_ROWS
        )
    return names


def _shard_map(local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    # The ops' loops start from constants, which the check for replicated values would refuse.
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


def _check_implementation(implementation: str | None, ways: int) -> None:
    if ways > 1 and implementation not in (None, "chunked"):
        raise ValueError(
            f"{implementation=} needs whole rows, but they are split over mesh axis context="
            f"{ways}; use 'chunked'"
        )


def _rank() -> Array:
    return jax.lax.axis_index(_AXIS)


def _from_before(x: Any, distance: int = 1, *, reverse: bool = False) -> Any:
    """What the rank `distance` before this one has, or after it (`reverse`); zeros without one."""
    ways = jax.lax.axis_size(_AXIS)
    pairs = [(r, r + distance) for r in range(ways - distance)]
    return jax.lax.ppermute(x, _AXIS, [(b, a) for a, b in pairs] if reverse else pairs)


def _around(x: Any) -> Any:
    """What the rank before this one has, the last one being before the first."""
    ways = jax.lax.axis_size(_AXIS)
    return jax.lax.ppermute(x, _AXIS, [(r, (r + 1) % ways) for r in range(ways)])


def _scan_stretches(combine: Callable, x: Any, *, reverse: bool = False) -> Any:
    """The `scan` of `ops.delta_rule.gated_delta_rule_stretch`, in log₂ steps."""
    x = _from_before(x, reverse=reverse)
    held = 1  # stretches whose combination this rank has
    while held < jax.lax.axis_size(_AXIS) - 1:
        x = combine(_from_before(x, held, reverse=reverse), x)
        held *= 2
    return x


def _dealing(ways: int) -> list[list[tuple[int, int]]]:
    """From whom to whom the first halves go, and the second ones: piece c to min(c, 2n − 1 − c)."""
    return [[(c // 2, min(c, 2 * ways - 1 - c)) for c in range(h, 2 * ways, 2)] for h in (0, 1)]


def _deal(x, ways):
    """This rank's tokens [B, T, ...] → the early and the late piece that it attends for."""
    halves = jnp.split(x, 2, axis=1)
    # Even pieces were first halves: they are the early ones of even ranks, the late ones of odd.
    first, second = (
        jax.lax.ppermute(half, _AXIS, pairs)
        for half, pairs in zip(halves, _dealing(ways), strict=True)
    )
    even = _rank() % 2 == 0
    return jnp.where(even, first, second), jnp.where(even, second, first)


def _collect(pieces, ways):
    """The reverse of `_deal`."""
    early, late = pieces
    even = _rank() % 2 == 0
    halves = jnp.where(even, early, late), jnp.where(even, late, early)
    return jnp.concatenate(
        [
            jax.lax.ppermute(half, _AXIS, [(b, a) for a, b in pairs])
            for half, pairs in zip(halves, _dealing(ways), strict=True)
        ],
        axis=1,
    )


def _split_halves(pieces):
    """Blocks of the early piece, then as many of the late one."""
    return jnp.concatenate([split_blocks(x) for x in pieces])


def _join_halves(x, tokens):
    return tuple(join_blocks(half, tokens) for half in jnp.split(x, 2))


# Blocks below as in ops/attention.py: q, out [Z B K R C H], k, v [Z B K C H], segments [Z B C]; the
# first half of them early tokens, the second half late ones.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ways, q, k, v, segments):
    return _ring_forward(ways, q, k, v, segments)[0]


def _ring_forward(ways, q, k, v, segments):
    def hop(state, number):
        carry, arrived = state
        following = _around(arrived)  # on its way during the products
        k, v, k_segments = arrived
        pairs = _seen_pairs(number, len(q))
        carry = accumulate(carry, q, k, v, segments, k_segments, pairs, causal=False)
        return (carry, following), None

    arrived = _around((k, v, segments))
    own = causal_pairs(len(q))
    carry = init_carry(q, v)
    carry = accumulate(carry, q, k, v, segments, segments, own, causal=True)
    (carry, _), _ = jax.lax.scan(hop, (carry, arrived), jnp.arange(1, ways))
    out, lse = finalize(carry, v.dtype)
    return out, (q, k, v, segments, out, lse)


def _ring_backward(ways, residuals, d_out):
    q, k, v, segments, out, lse = residuals

    def gradients(d_q, k, v, k_segments, pairs, causal):
        return accumulate_gradients(
            d_q, q, k, v, segments, k_segments, lse, out, d_out, pairs, causal=causal
        )

    def hop(state, number):
        d_q, d_kv, arrived = state
        following, d_kv = _around((arrived, d_kv))
        k, v, k_segments = arrived
        d_q, *added = gradients(d_q, k, v, k_segments, _seen_pairs(number, len(q)), False)
        # What these keys and values gathered on earlier ranks has followed them here.
        return (d_q, jax.tree.map(jnp.add, d_kv, tuple(added)), following), None

    arrived = _around((k, v, segments))
    own = causal_pairs(len(q))
    d_q, *d_kv = gradients(jnp.zeros(q.shape, jnp.float32), k, v, segments, own, True)
    hops = jnp.arange(1, ways)
    (d_q, d_kv, _), _ = jax.lax.scan(hop, (d_q, tuple(d_kv), arrived), hops)
    grads = d_q, *_around(d_kv)  # the last hop brings them home
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_ring.defvjp(_ring_forward, _ring_backward)


def _seen_pairs(hop, number):
    """Pairs of a query block with an arriving key block, after so many hops: all seen whole.

    What arrives at rank r comes from rank r − hop. The late piece here is later than the early one
    from anywhere. Then early sees early if that rank is before this one, and late sees late if it
    is behind.
    """
    half = number // 2
    i, j = (x.reshape(-1).astype(np.int32) for x in np.indices((half, half)))
    behind = (hop > _rank()).astype(jnp.int32) * half
    return jnp.concatenate([half + i, behind + i]), jnp.concatenate([j, behind + j])
