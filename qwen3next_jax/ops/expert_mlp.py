"""The experts' feed-forward: two grouped products with a SwiGLU between them.

    y_r = w_r (silu(x_r G_e) · (x_r U_e)) D_e     rows r sorted by expert e(r)

Implementations:
- "pallas": kernels for TPUs (`pallas/expert_mlp.py`), for experts that fit into vector memory.
- "products": `grouped_matmul` twice, for larger experts on TPUs, and for Hopper GPUs.
- "blocked": for CPUs and other GPUs. Each expert's rows fill whole blocks, and loops visit the
  blocks that hold rows, several at a time. On a CPU the values between the two products stay in
  cache. A block's results overwrite its rows. If blocks are single rows, as in decoding, a CPU
  instead reads each row's matrices in place: decoding is bound by memory, and a visit would copy
  the matrices first.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.cpu import gather, once, product_over_rows, writable
from qwen3next_jax.ops.grouped_matmul import MOST_ROWS, grouped_matmul, groups_of_blocks
from qwen3next_jax.ops.grouped_matmul import default_implementation as default_grouped_matmul
from qwen3next_jax.ops.pallas.expert_mlp import can_compile
from qwen3next_jax.ops.pallas.expert_mlp import expert_mlp as by_kernel
from qwen3next_jax.ops.platform import check_implementation, platform

# Blocks of a visit. On a GPU a visit takes blocks of many experts, to keep the GPU busy: it gathers
# a copy of their matrices first, and a host sync follows each visit to decide whether to continue.
# On a CPU a visit takes a run of consecutive blocks of one expert, because its cores share products
# of many rows best; each run length is one more loop to compile. With small blocks there are only
# runs of 1, because an expert rarely has several blocks then.
_EXPERTS_AT_ONCE = 32  # experts of a visit on a GPU
_RUNS = (3, 2, 1)  # run lengths on a CPU
_LONG_RUNS = (5, 3, 1)  # where experts have as many blocks on average
_ROWS_OF_RUNS = 16  # smallest block for which runs are longer than 1
_SUMMED_AT_ONCE = 8  # products; each repeats the gather, and with 16 XLA copies the matrices
_SUMS_AT_ONCE = 32  # sums of products that are added in one loop


def default_implementation(size: int, width: int, dtype: jnp.dtype, block: int) -> str:
    """Returns the best implementation for the platform (`ops.platform`) and the experts' sizes.

    Args:
      size: model dimension D.
      width: hidden size F of an expert.
      dtype: dtype of rows and matrices.
      block: number of which each expert's number of rows is a multiple.
    """
    if platform() == "tpu":
        return "pallas" if can_compile(size, width, dtype) else "products"
    return (
        "products" if default_grouped_matmul(size, width, dtype, block) == "hopper" else "blocked"
    )


def expert_mlp(
    rows: Float[Array, "R D"],
    weights: Float[Array, "R"],
    gate_up: Float[Array, "E 2 D F"],
    down: Float[Array, "E F D"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
    block: int = MOST_ROWS,
    expected_rows: int | None = None,
) -> Float[Array, "R D"]:
    """Maps each row by its expert's MLP.

    Args:
      rows: input rows, sorted by expert; results and gradients of rows after the last expert's are
        undefined.
      weights: router's weight of each row, float32.
      gate_up, down: matrices of each expert, in rows' dtype; G before U.
      group_sizes: number of rows of each expert; multiples of block, but arbitrary for "pallas".
      implementation: "pallas", "blocked" or "products"; None: the platform's default.
      block: number of rows of a block, as `row_alignment` returns it; not used by "pallas".
      expected_rows: expected number of rows of all experts together, for the cost estimate of
        "pallas"; None: all rows.

    Returns:
      Weighted rows, in rows' dtype.

    Raises:
      ValueError: for an unknown implementation, or rows that "blocked" cannot cut into blocks.
    """
    if implementation is None:
        implementation = default_implementation(rows.shape[1], down.shape[1], rows.dtype, block)
    check_implementation(implementation, "pallas", "blocked", "products")
    if implementation == "pallas":
        expected = len(rows) if expected_rows is None else expected_rows
        return by_kernel(rows, weights, gate_up, down, group_sizes, expected)
    if implementation == "blocked":
        if len(rows) % block:
            raise ValueError(
                f"{implementation=} needs a multiple of {block=} rows, got {len(rows)}"
            )
        spare = -(len(rows) // block) % _at_once(len(rows), block) * block
        padded = jnp.pad(rows, ((0, spare), (0, 0))), jnp.pad(weights, (0, spare))
        lengths = _lengths(len(rows), len(down), block)
        return _blocked(*padded, gate_up, down, group_sizes, block, lengths)[: len(rows)]
    both = grouped_matmul(rows, _side_by_side(gate_up), group_sizes, block=block)
    # Apply the weights before the second product, where rows are narrowest, in float32.
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    hidden = _between(gate, up, weights).astype(rows.dtype)
    return grouped_matmul(hidden, down, group_sizes, block=block)


def _at_once(rows, block):
    return max(1, min(_EXPERTS_AT_ONCE, rows // block)) if platform() == "gpu" else 1


def _between(gate, up, weights):
    return jax.nn.silu(gate) * up * weights[..., None]


def _side_by_side(gate_up):
    """[E, 2, D, F] → [E, D, 2 F], for one product with both."""
    return gate_up.swapaxes(1, 2).reshape(len(gate_up), gate_up.shape[2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blocked(rows, weights, gate_up, down, group_sizes, block, lengths):
    if block == 1 and platform() == "cpu":  # gradients need blocks
        return _row_by_row(rows, weights, gate_up, down, group_sizes)

    plan = _plan(group_sizes, len(rows), block, lengths)
    return _forward(rows, weights, gate_up, down, plan, block, lengths)[0]


def _blocked_forward(rows, weights, gate_up, down, group_sizes, block, lengths):
    plan = _plan(group_sizes, len(rows), block, lengths)
    keep = [jnp.zeros((len(rows), gate_up.shape[3]), writable(rows.dtype))] * 2
    out, *kept = _forward(rows, weights, gate_up, down, plan, block, lengths, keep)
    kept = [x.astype(rows.dtype) for x in kept]
    return out, (rows, weights, gate_up, down, plan, kept)


def _forward(rows, weights, gate_up, down, plan, block, lengths, keep=()):
    """Returns the results, and `keep`, two arrays [R, F] if given, with gates and ups in them."""

    def visit(at, carry):
        out, *kept = carry
        both = gate, up = _gate_and_up(at.rows(out).astype(rows.dtype), gate_up, at)
        hidden = _between(gate, up, at.rows(weights)).astype(rows.dtype)
        out = at.put(out, _product("zrf,zfd->zrd", hidden, at.experts(down)))
        return out, *map(at.put, kept, both)

    carry = (rows.astype(writable(rows.dtype)), *keep)
    out, *kept = _visit_all(visit, carry, plan, block, lengths)
    return out.astype(rows.dtype), *kept


def _blocked_backward(block, lengths, residuals, d_out):
    rows, weights, gate_up, down, plan, kept = residuals
    dtype = rows.dtype

    def visit(at, carry):
        d_rows, d_weights, d_gate_up, d_down = carry
        x, d_y = at.rows(rows), at.rows(d_rows).astype(dtype)
        gate, up = (at.rows(products).astype(jnp.float32) for products in kept)
        hidden, pull = jax.vjp(_between, gate, up, at.rows(weights))
        *d_both, d_w = pull(_product("zrd,zfd->zrf", d_y, at.experts(down)))
        # A visit may include blocks without an expert, whose gradients `add` drops.
        d_down = at.add(d_down, product_over_rows(hidden.astype(dtype), d_y))
        d_x = jnp.zeros(x.shape, jnp.float32)
        for j, d_one in enumerate(d_both):
            d_one = d_one.astype(dtype)
            d_gate_up = at.add(d_gate_up, product_over_rows(x, d_one), j)
            d_x += _product("zrf,zdf->zrd", d_one, at.experts(gate_up, j))
        return at.put(d_rows, d_x), at.put(d_weights, d_w), d_gate_up, d_down

    start = (
        d_out.astype(writable(dtype)),
        jnp.zeros_like(weights),
        jnp.zeros(gate_up.shape, jnp.float32),
        jnp.zeros(down.shape, jnp.float32),
    )
    d_rows, d_weights, d_gate_up, d_down = _visit_all(visit, start, plan, block, lengths)
    return (d_rows.astype(dtype), d_weights, *(d.astype(dtype) for d in (d_gate_up, d_down)), None)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _row_by_row(rows, weights, gate_up, down, group_sizes):
    expert, _ = groups_of_blocks(group_sizes, len(rows), 1)
    both = _gathered_product(rows[:, None], gate_up, expert)
    hidden = _between(both[:, 0], both[:, 1], weights).astype(rows.dtype)
    return _gathered_product(hidden, down, expert).astype(rows.dtype)


def _gathered_product(
    x: Float[Array, "R *#P D"], matrices: Float[Array, "E *P D F"], index: Int[Array, "R"]
) -> Float[Array, "R *P F"]:
    """Computes x_r · matrices[index_r] in float32, without copying the matrices.

    The elementwise form makes XLA:CPU read the matrices in place, in one loop over all cores. A
    full sum in that loop would go down the columns one by one. So the loop adds only a few entries,
    and further loops add the sums of those. The added entries are far apart in memory, so that each
    of these streams is sequential and can be prefetched.
    """
    *lead, D, F = matrices.shape[1:]
    n = math.gcd(D, _SUMMED_AT_ONCE)
    x = x.reshape(*x.shape[:-1], n, D // n, 1).astype(jnp.float32)
    parts = matrices.reshape(-1, *lead, n, D // n, F)
    taken = gather(_clipped, parts, index).astype(jnp.float32)
    total = _sum_of([x[..., i, :, :] * taken[..., i, :, :] for i in range(n)])
    while (n := math.gcd(total.shape[-2], _SUMS_AT_ONCE)) > 1:
        # Without `once`, XLA would fuse these sums with those they add, and copy the matrices.
        total = once(lambda x, n=n: _sum_of(jnp.split(x, n, axis=-2)), total)
    # What remains of sizes that have odd factors; a sum would be fused, too.
    return jnp.einsum("...kf,k->...f", total, jnp.ones(total.shape[-2]))


def _clipped(x, *index):
    return x.at[index].get(mode="clip", wrap_negative_indices=False)


def _sum_of(summands):
    return functools.reduce(jnp.add, summands)


def _gate_and_up(x, gate_up, at):
    """Two products, because a single one would have to concatenate the matrices in each visit."""
    return [_product("zrd,zdf->zrf", x, at.experts(gate_up, j)) for j in range(2)]


@dataclasses.dataclass
class _Visit:
    """A range of consecutive rows, `size` rows of each of Z experts."""

    index: Int[Array, "Z"]  # experts; E for blocks without an expert
    start: Int[Array, ""]  # first row
    size: int  # number of rows of each expert

    def rows(self, x):
        x = jax.lax.dynamic_slice_in_dim(x, self.start, len(self.index) * self.size)
        return x.reshape(len(self.index), self.size, *x.shape[1:])

    def put(self, x, values):
        values = values.astype(x.dtype).reshape(-1, *values.shape[2:])
        return jax.lax.dynamic_update_slice_in_dim(x, values, self.start, axis=0)

    def experts(self, x, *rest):
        return gather(lambda x, index: _clipped(x, index, *rest), x, self.index)

    def add(self, x, values, *rest):
        return x.at[self.index, *rest].add(values, mode="drop", wrap_negative_indices=False)


def _plan(group_sizes, rows, block, lengths):
    """For each of `lengths`, the visits' experts [N, Z], first blocks [N], and their number."""
    at_once = _at_once(rows, block)
    if at_once > 1:
        groups, used = groups_of_blocks(group_sizes, rows, block)
        groups = groups.reshape(-1, at_once)
        return [(groups, jnp.arange(len(groups)) * at_once, -(-used // at_once))]
    left = group_sizes // block
    first = jnp.cumsum(left) - left
    plan = []
    for length in lengths:
        runs, left = left // length, left % length
        expert, used = groups_of_blocks(runs, rows // block // length, 1)
        start = first - (jnp.cumsum(runs) - runs) * length  # minus the blocks of earlier runs
        start = _clipped(start, expert) + jnp.arange(len(expert)) * length
        plan.append((expert[:, None], start, used))
        first += runs * length
    return plan


def _visit_all(visit, carry, plan, block, lengths):
    """Folds `visit(visit description, carry)` over all visits and returns the carry."""
    for (experts, starts, count), length in zip(plan, lengths, strict=True):

        def body(i, carry, experts=experts, starts=starts, size=length * block):
            return visit(_Visit(experts[i], starts[i] * block, size), carry)

        if len(starts):
            carry = jax.lax.fori_loop(0, count, body, carry)
    return carry


def _lengths(rows, experts, block):
    """The numbers of blocks that visits take, the largest first."""
    if platform() != "cpu" or block < _ROWS_OF_RUNS:
        return (1,)
    return _LONG_RUNS if rows // block // experts >= _LONG_RUNS[0] else _RUNS


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
