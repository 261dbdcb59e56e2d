"""The experts' feed-forward as two TPU kernels, forward and backward.

    y_r = w_r (silu(x_r G_e) · (x_r U_e)) D_e     rows r sorted by expert e(r)

A program takes a tile of rows and one expert's matrices, which stay in the chip's vector memory
until the next expert's are needed. A tile with rows of several experts is visited once for each of
them; tiles after the last expert's rows are not visited. Intermediate values between the products
stay on the chip. The backward kernel reads the rows, the gradients of their results and the
matrices, recomputes the products with the gate and up matrices, and writes the gradients of rows,
weights and matrices. The gradients of an expert's matrices are summed in float32 over its tiles. It
leaves these out, three of eight products, where nothing is differentiated by a matrix, as when
experts are frozen.

*Layout.* A TPU stores a matrix in tiles of 8 rows by 128 columns, so that one row is spread over
many tiles. Rows that are gathered and sent one by one are stored as whole tiles instead, [R,
D / 128, 128], and are rearranged to a matrix on the chip, which costs no memory traffic.

*Costs* are stated for the expected number of rows, as if every expert's first and last tile were
shared with another expert; the executed number of tiles depends on the router.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from qwen3next_jax.ops.pallas import tpu
from qwen3next_jax.ops.pallas.tpu import LANES, VMEM_BYTES

TILE = 256  # rows of a tile, at most
_FEW = 16  # rows that are stored at a time; a tile's rows are a multiple


def can_compile(size: int, width: int, dtype: jnp.dtype) -> bool:
    """Whether experts of these sizes are multiples of a TPU's lanes and fit into its vector memory.

    Args:
      size: model dimension D.
      width: hidden size F of an expert.
      dtype: dtype of rows and matrices.
    """
    bytes_each = jnp.dtype(dtype).itemsize
    # Double-buffered: an expert's matrices and their gradients, and a tile's rows, their gradients
    # and those of the results. Single, in float32: the sums and a tile's intermediate values.
    twice = bytes_each * (2 * 3 * size * width + 3 * TILE * size)
    once = 4 * (3 * size * width + TILE * (3 * size + 6 * width))
    # The compiler was measured to allocate 0.94 to 1.04 times as much in bfloat16, and 1.46 times
    # in float32, where it splits factors into parts.
    needed = (1.1 if bytes_each == 2 else 1.5) * (2 * twice + once)
    return size % LANES == width % LANES == 0 and needed < VMEM_BYTES


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def expert_mlp(
    rows: Float[Array, "R D"],
    weights: Float[Array, "R"],
    gate_up: Float[Array, "E 2 D F"],
    down: Float[Array, "E F D"],
    group_sizes: Int[Array, "E"],
    expected_rows: int,
) -> Float[Array, "R D"]:
    """Runs the kernels; on a CPU they are interpreted, for tests only.

    Args:
      rows: input rows, sorted by expert. Rows after the last expert's may hold anything; their
        results and gradients are undefined.
      weights: router's weight of each row, float32.
      gate_up, down: matrices of each expert, in rows' dtype; G before U.
      group_sizes: number of rows of each expert.
      expected_rows: expected number of rows of all experts together, for the cost estimate.

    Returns:
      Weighted rows in rows' dtype.
    """
    return _forward(rows, weights, gate_up, down, group_sizes, expected_rows)


def _forward(rows, weights, gate_up, down, group_sizes, expected_rows):
    tiles = _Tiles(rows, down, group_sizes, expected_rows, visit_empty=False)
    given = tiles.cut(rows), tiles.lanes(weights), gate_up, down
    out = tpu.pallas_call(
        _forward_kernel,
        grid_spec=tiles.grid(("rows", "lanes", "gate_up", "down"), ("rows",), tiles.matrix),
        out_shape=tiles.shape("rows"),
        cost_estimate=tiles.cost(products=3, arrays=("rows", "rows", "lanes", "gate_up", "down")),
        name="expert_mlp_forward",
        semantics=("arbitrary",),
    )(*tiles.scalars, *given)
    return out.reshape(rows.shape)


def _expert_mlp_forward(rows, weights, gate_up, down, group_sizes, expected_rows):
    # No array but a structure, which the backward pass knows when it is traced.
    of_matrices = () if gate_up.perturbed or down.perturbed else None
    given = (rows, weights, gate_up, down, group_sizes)
    rows, weights, gate_up, down, group_sizes = (x.value for x in given)
    out = _forward(rows, weights, gate_up, down, group_sizes, expected_rows)
    return out, (rows, weights, gate_up, down, group_sizes, of_matrices)


def _expert_mlp_backward(expected_rows, residuals, d_out):
    rows, weights, gate_up, down, group_sizes, of_matrices = residuals
    trained = of_matrices is not None
    # An expert without rows is visited for its gradients, which are zeros.
    tiles = _Tiles(rows, down, group_sizes, expected_rows, visit_empty=trained)
    given = ("rows", "rows", "lanes", "gate_up", "down")
    results = ("rows", "lanes", "gate_up", "down") if trained else ("rows", "lanes")
    sums = (pltpu.VMEM(x.shape[1:], jnp.float32) for x in (gate_up, down) if trained)
    d_rows, d_weights, *d_matrices = tpu.pallas_call(
        _backward_kernel,
        grid_spec=tiles.grid(given, results, tiles.matrix, *sums),
        out_shape=[tiles.shape(name) for name in results],
        cost_estimate=tiles.cost(products=8 if trained else 5, arrays=given + results),
        name="expert_mlp_backward",
        semantics=("arbitrary",),
    )(*tiles.scalars, tiles.cut(rows), tiles.cut(d_out), tiles.lanes(weights), gate_up, down)
    d_weights = d_weights.reshape(-1)[: len(rows)]
    return d_rows.reshape(rows.shape), d_weights, *(d_matrices or (None, None)), None


expert_mlp.defvjp(_expert_mlp_forward, _expert_mlp_backward, symbolic_zeros=True)


class _Tiles:
    """How the work is divided: each step takes a tile of rows and an expert."""

    def __init__(self, rows, down, group_sizes, expected_rows, *, visit_empty):
        self.R, self.D = rows.shape
        self.E, self.F, _ = down.shape
        self.dtype = rows.dtype
        self.tile = min(TILE, -(-self.R // _FEW) * _FEW)
        self.tiles = -(-self.R // self.tile)
        self.matrix = pltpu.VMEM((self.tile, self.D), self.dtype)
        self.expected_steps = -(-expected_rows // self.tile) + self.E - 1
        ends = jnp.cumsum(group_sizes.astype(jnp.int32))
        starts = ends - group_sizes
        first = jnp.minimum(starts // self.tile, self.tiles - 1)
        visits = jnp.where(group_sizes > 0, -(-ends // self.tile) - first, int(visit_empty))
        last_step = jnp.cumsum(visits)
        self.steps = last_step[-1]
        step = jnp.arange(self.tiles + self.E)
        expert = jnp.searchsorted(last_step, step, side="right", method="compare_all")
        expert = jnp.minimum(expert, self.E - 1).astype(jnp.int32)
        tile = (first + visits - last_step)[expert] + step
        self.scalars = (
            expert,
            jnp.minimum(tile, self.tiles - 1).astype(jnp.int32),
            starts.astype(jnp.int32),
            ends.astype(jnp.int32),
        )

    def cut(self, rows):
        """[R, D] → [R, D / 128, 128]."""
        return rows.reshape(self.shape("rows").shape)

    def lanes(self, weights):
        """[R] → [tiles, 1, tile]."""
        padding = self.tiles * self.tile - self.R
        return jnp.pad(weights.astype(jnp.float32), (0, padding)).reshape(self.tiles, 1, -1)

    def shape(self, name):
        lanes = LANES if self.D % LANES == 0 else self.D
        shape = {
            "rows": (self.R, self.D // lanes, lanes),
            "lanes": (self.tiles, 1, self.tile),
            "gate_up": (self.E, 2, self.D, self.F),
            "down": (self.E, self.F, self.D),
        }[name]
        return jax.ShapeDtypeStruct(shape, jnp.float32 if name == "lanes" else self.dtype)

    def spec(self, name):
        first = self.tile if name == "rows" else None
        which = 0 if name in ("gate_up", "down") else 1  # index of the expert, or of the tile
        rest = self.shape(name).shape[1:]
        return pl.BlockSpec(
            (first, *rest), lambda i, *scalars: (scalars[which][i], *[0] * len(rest))
        )

    def grid(self, given, results, *scratch):
        outs = [self.spec(name) for name in results]
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(self.scalars),
            grid=(self.steps,),
            in_specs=[self.spec(name) for name in given],
            out_specs=outs if len(outs) > 1 else outs[0],
            scratch_shapes=list(scratch),
        )

    def cost(self, *, products, arrays):
        """The cost of a kernel.

        Args:
          products: number of products of each row with a matrix [D, F] or its transpose.
          arrays: names of the arrays that the kernel reads or writes.
        """
        passes = 1 if self.dtype == jnp.bfloat16 else 6
        rows = self.expected_steps * self.tile
        sizes = [(name, math.prod(self.shape(name).shape)) for name in arrays]
        return pl.CostEstimate(
            flops=2 * passes * products * rows * self.D * self.F,
            transcendentals=rows * self.F,
            bytes_accessed=sum(
                # Of arrays with rows, only the expected rows count.
                (size if name in ("gate_up", "down") else size * rows // (self.tiles * self.tile))
                * self.shape(name).dtype.itemsize
                for name, size in sizes
            ),
        )


def _forward_kernel(
    experts, tiles, starts, ends, rows_ref, weights_ref, gate_up_ref, down_ref, out_ref, out
):
    expert, tile = (x[pl.program_id(0)] for x in (experts, tiles))
    x = _matrix(rows_ref)
    gate, up = tpu.dot(x, gate_up_ref[0]), tpu.dot(x, gate_up_ref[1])
    hidden = jax.nn.silu(gate) * up * _column(weights_ref[...])
    out[...] = tpu.dot(hidden.astype(x.dtype), down_ref[...]).astype(out.dtype)
    _store(out_ref, out, starts[expert] - tile * x.shape[0])


def _backward_kernel(
    experts,
    tiles,
    starts,
    ends,
    rows_ref,
    d_out_ref,
    weights_ref,
    gate_up_ref,
    down_ref,
    d_rows_ref,
    d_weights_ref,
    *rest,
):
    """Its last arguments are the matrices' gradients, d_rows and their sums; or d_rows alone."""
    half = len(rest) // 2
    d_matrices, d_rows, sums = rest[:half], rest[half], rest[half + 1 :]
    step, last = pl.program_id(0), pl.num_programs(0) - 1
    expert, tile = experts[step], tiles[step]
    x, d_out = _matrix(rows_ref), _matrix(d_out_ref)
    start, end = (s[expert] - tile * len(x) for s in (starts, ends))

    @pl.when((step == 0) | (experts[jnp.maximum(step - 1, 0)] != expert))
    def _():
        for total in sums:
            total[...] = jnp.zeros_like(total)

    # Rows of other experts, or of none, may hold anything, NaN included.
    row = jax.lax.broadcasted_iota(jnp.int32, (len(x), 1), 0)
    own = (row >= start) & (row < end)
    x, d_out = (jnp.where(own, a.astype(jnp.float32), 0).astype(a.dtype) for a in (x, d_out))
    weights = jnp.where(own, _column(weights_ref[...]), 0)
    gate, up = tpu.dot(x, gate_up_ref[0]), tpu.dot(x, gate_up_ref[1])
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    product = silu * up
    d_weighted = tpu.dot(d_out, down_ref[...], contract=(1, 1))
    d_product = d_weighted * weights
    d_gate = (d_product * up * (sigmoid + silu * (1 - sigmoid))).astype(x.dtype)
    d_up = (d_product * silu).astype(x.dtype)
    through = tpu.dot(d_gate, gate_up_ref[0], contract=(1, 1))
    d_rows[...] = (through + tpu.dot(d_up, gate_up_ref[1], contract=(1, 1))).astype(x.dtype)
    _store(d_rows_ref, d_rows, start)
    lane = jax.lax.broadcasted_iota(jnp.int32, d_weights_ref.shape, 1)
    d_weights = _lanes((d_weighted * product).sum(1, keepdims=True))
    d_weights_ref[...] = jnp.where(lane >= start, d_weights, d_weights_ref[...])
    if not sums:
        return
    d_gate_up_sum, d_down_sum = sums
    weighted = (product * weights).astype(x.dtype)
    d_gate_up_sum[0] += tpu.dot(x, d_gate, contract=(0, 0))
    d_gate_up_sum[1] += tpu.dot(x, d_up, contract=(0, 0))
    d_down_sum[...] += tpu.dot(weighted, d_out, contract=(0, 0))

    @pl.when((step == last) | (experts[jnp.minimum(step + 1, last)] != expert))
    def _():
        for ref, total in zip(d_matrices, sums, strict=True):
            ref[...] = total[...].astype(ref.dtype)


def _matrix(ref):
    """[tile, D / 128, 128] → [tile, D]."""
    return ref[...].reshape(ref.shape[0], -1)


def _store(ref, values_ref, start):
    """Writes the rows of values [tile, D] from `start` on; keeps earlier rows, of other experts."""
    tile = ref.shape[0]
    shape = _FEW, *ref.shape[1:]

    def store_few(i, carry):
        few = pl.ds(i * _FEW, _FEW)
        row = i * _FEW + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        values = values_ref[few].reshape(shape).astype(jnp.float32)
        others = ref[few].astype(jnp.float32)
        ref[few] = jnp.where(row >= start, values, others).astype(ref.dtype)
        return carry

    # Without the loop the kernel would take minutes to compile.
    jax.lax.fori_loop(0, tile // _FEW, store_few, 0)


def _column(lanes):
    """[1, tile] → [tile, 1]; broadcast first, because a TPU only transposes whole vectors."""
    return jnp.broadcast_to(lanes, (8, lanes.shape[1])).T[:, :1]


def _lanes(column):
    """[tile, 1] → [1, tile]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
