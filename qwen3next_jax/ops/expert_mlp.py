"""The experts' feed-forward: two grouped products and what lies between them.

    y_r = w_r (silu(x_r G_e) · (x_r U_e)) D_e     rows r sorted by expert e(r)

Implementations:
- "pallas": kernels for TPUs (`pallas/expert_mlp.py`), for experts that fit them.
- "products": `grouped_matmul` twice, for experts that do not, and for Hopper GPUs.
- "blocked": for CPUs and other GPUs. Each expert's rows fill whole blocks, and a loop visits the
  blocks that hold rows, several at a time. Each of these is a product with its own matrix, which
  cores share better than the parts of one product. On a CPU what lies between the two products
  never leaves the cache. A block's results overwrite its rows.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.grouped_matmul import MOST_ROWS, grouped_matmul, groups_of_blocks
from qwen3next_jax.ops.grouped_matmul import default_implementation as product
from qwen3next_jax.ops.pallas.expert_mlp import can_compile
from qwen3next_jax.ops.pallas.expert_mlp import expert_mlp as by_kernel
from qwen3next_jax.ops.platform import platform

# How many blocks a loop visits at a time. A GPU needs many to be busy, and must hear from the host
# after each visit whether there is another; the matrices of a visit are copied together first.
_AT_ONCE = {"cpu": 8, "gpu": 32}


def default_implementation(size: int, width: int, dtype: jnp.dtype, block: int) -> str:
    """The implementation that suits the platform and the experts' sizes; see `ops.platform`.

    Args:
      size: of a row.
      width: of an expert between its products.
      dtype: of rows and matrices.
      block: of what experts' rows are multiples.
    """
    if platform() == "tpu":
        return "pallas" if can_compile(size, width, dtype) else "products"
    return "products" if product(size, width, dtype, block) == "hopper" else "blocked"


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
      rows: sorted by expert; what rows behind the last expert's give, or get as gradient, may be
        anything.
      weights: of each row, float32.
      gate_up, down: each expert's matrices, in rows' dtype; G before U.
      group_sizes: rows of each expert; multiples of block, but for "pallas" any.
      implementation: "pallas", "blocked" or "products"; None: the platform's default.
      block: rows of a block, as `row_alignment` gives them; "pallas" doesn't read it.
      expected_rows: how many rows are likely to come, of all experts together, for the costs that
        "pallas" states; None: all.

    Returns:
      Weighted rows, in rows' dtype.

    Raises:
      ValueError: for an unknown implementation, or rows that "blocked" cannot cut into blocks.
    """
    if implementation is None:
        implementation = default_implementation(rows.shape[1], down.shape[1], rows.dtype, block)
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
        return _blocked(*padded, gate_up, down, group_sizes, block)[: len(rows)]
    if implementation != "products":
        raise ValueError(
            f"{implementation=} is unknown; expected 'pallas', 'blocked' or 'products'"
        )
    both = grouped_matmul(rows, _side_by_side(gate_up), group_sizes, block=block)
    # Weighed before the second product, where rows are narrowest, in float32.
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    hidden = _between(gate, up, weights).astype(rows.dtype)
    return grouped_matmul(hidden, down, group_sizes, block=block)


def _at_once(rows, block):
    # Few rows a block are few rows in all: to read matrices for blocks without rows would cost a
    # CPU more than the products.
    if platform() == "cpu" and block < MOST_ROWS:
        return 1
    return max(1, min(_AT_ONCE.get(platform(), 1), rows // block))


def _between(gate, up, weights):
    return jax.nn.silu(gate) * up * weights[..., None]


def _side_by_side(gate_up):
    """[E, 2, D, F] → [E, D, 2 F], for one product with both."""
    return gate_up.swapaxes(1, 2).reshape(len(gate_up), gate_up.shape[2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(rows, weights, gate_up, down, group_sizes, block):
    visits = _Visits(rows, group_sizes, block)

    def visit(i, out):
        expert = visits.take(visits.group, i)
        gate, up = _gate_and_up(visits.blocks(out, i), gate_up, expert)
        hidden = _between(gate, up, visits.blocks(weights, i)).astype(rows.dtype)
        return visits.put(out, i, _product("zrf,zfd->zrd", hidden, down[expert]))

    return jax.lax.fori_loop(0, visits.used, visit, rows)


def _blocked_forward(rows, weights, gate_up, down, group_sizes, block):
    visits = _Visits(rows, group_sizes, block)

    def visit(i, carry):
        out, gates, ups = carry
        expert = visits.take(visits.group, i)
        gate, up = _gate_and_up(visits.blocks(out, i), gate_up, expert)
        gates, ups = visits.put(gates, i, gate), visits.put(ups, i, up)
        hidden = _between(gate, up, visits.blocks(weights, i)).astype(rows.dtype)
        return visits.put(out, i, _product("zrf,zfd->zrd", hidden, down[expert])), gates, ups

    kept = jnp.zeros((len(rows), gate_up.shape[3]), rows.dtype)
    out, *kept = jax.lax.fori_loop(0, visits.used, visit, (rows, kept, kept))
    return out, (rows, weights, gate_up, down, group_sizes, kept)


def _blocked_backward(block, residuals, d_out):
    rows, weights, gate_up, down, group_sizes, kept = residuals
    visits, dtype = _Visits(rows, group_sizes, block), rows.dtype

    def visit(i, carry):
        d_rows, d_weights, d_gate_up, d_down = carry
        expert = visits.take(visits.group, i)
        x, d_y = visits.blocks(rows, i), visits.blocks(d_rows, i)
        gate, up = (visits.blocks(products, i).astype(jnp.float32) for products in kept)
        hidden, pull = jax.vjp(_between, gate, up, visits.blocks(weights, i))
        *d_both, d_w = pull(_product("zrd,zfd->zrf", d_y, down[expert]))
        # Blocks without an expert are taken along with the last ones, but add to no gradient.
        d_down = d_down.at[expert].add(_product("zrf,zrd->zfd", hidden.astype(dtype), d_y))
        d_x = jnp.zeros(x.shape, jnp.float32)
        for j, d_one in enumerate(d_both):
            d_one = d_one.astype(dtype)
            d_gate_up = d_gate_up.at[expert, j].add(_product("zrd,zrf->zdf", x, d_one))
            d_x += _product("zrf,zdf->zrd", d_one, gate_up[expert, j])
        return visits.put(d_rows, i, d_x), visits.put(d_weights, i, d_w), d_gate_up, d_down

    start = (
        d_out, jnp.zeros_like(weights),
        jnp.zeros(gate_up.shape, jnp.float32), jnp.zeros(down.shape, jnp.float32),
    )  # fmt: skip
    d_rows, d_weights, d_gate_up, d_down = jax.lax.fori_loop(0, visits.used, visit, start)
    return d_rows, d_weights, d_gate_up.astype(dtype), d_down.astype(dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _gate_and_up(x, gate_up, expert):
    """Two products: for one, each visit would have to put the matrices side by side."""
    return (_product("zrd,zdf->zrf", x, gate_up[expert, j]) for j in range(2))


class _Visits:
    """Which blocks a loop takes at a time, out of arrays of rows and back."""

    def __init__(self, rows, group_sizes, block):
        self.block = block
        self.group, used = groups_of_blocks(group_sizes, len(rows), block)
        self.count = _at_once(len(rows), block)
        self.used = -(-used // self.count)

    def take(self, x, i):
        return jax.lax.dynamic_slice_in_dim(x, i * self.count, self.count)

    def blocks(self, x, i):
        size = self.count * self.block
        x = jax.lax.dynamic_slice_in_dim(x, i * size, size)
        return x.reshape(self.count, self.block, *x.shape[1:])

    def put(self, x, i, blocks):
        values = blocks.astype(x.dtype).reshape(-1, *blocks.shape[2:])
        return jax.lax.dynamic_update_slice_in_dim(x, values, i * len(values), axis=0)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
