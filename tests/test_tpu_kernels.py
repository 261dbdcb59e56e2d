"""The kernels by the real TPU compiler, which needs no TPU, at the 80B model's sizes."""

import jax
import jax.numpy as jnp
import pytest
from tpu_program import compiled, lowered

from qwen3next_jax.config import MeshConfig
from qwen3next_jax.ops import attention, causal_conv, gated_delta_rule
from qwen3next_jax.ops.attention import causal_pairs, finalize, init_carry, out_dot
from qwen3next_jax.ops.pallas import attention_blocks
from qwen3next_jax.ops.pallas.expert_mlp import can_compile, expert_mlp
from qwen3next_jax.parallel import context
from qwen3next_jax.parallel.mesh import make_mesh
from qwen3next_jax.plan import tpu
from qwen3next_jax.plan.chips import CHIPS
from qwen3next_jax.plan.hlo import estimate


def delta_rule_gradients(q, k, v, g, beta, segments):
    def loss(q, k, v, g, beta):
        out, state = gated_delta_rule(q, k, v, log_decay=g, beta=beta, segment_ids=segments)
        return out.astype(jnp.float32).sum() + state.sum()

    return jax.grad(loss, argnums=range(5))(q, k, v, g, beta)


def attention_gradients(q, k, v, segments):
    def loss(q, k, v):
        return attention(q, k, v, segment_ids=segments).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=range(3))(q, k, v)


def split_delta_rule(q, k, v, g, beta, segments):
    return context.gated_delta_rule(q, k, v, log_decay=g, beta=beta, segment_ids=segments)[0]


def split_attention(q, k, v, segments):
    return context.attention(q, k, v, segment_ids=segments)


def conv_gradients(x, kernel, segments, d_out):
    def conv(x, kernel):
        # As the layer has it between its projections and the delta rule, head by head.
        y = causal_conv(x.swapaxes(1, 2), kernel, activation="silu", segment_ids=segments)
        return y.swapaxes(1, 2)

    out, vjp = jax.vjp(conv, x, kernel)
    return out, *vjp(d_out)


def expert_gradients(rows, weights, gate_up, down, sizes):
    def loss(rows, weights, gate_up, down):
        y = expert_mlp(rows, weights, gate_up, down, sizes, len(rows))
        return y.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=range(4))(rows, weights, gate_up, down)


def block_gradients(q, k, v, segments):
    pairs = causal_pairs(len(q))
    given = q, k, v, segments, segments
    carry = attention_blocks.accumulate(init_carry(q, v), *given, pairs, causal=True)
    out, lse = finalize(carry, v.dtype)
    zeros = jnp.zeros(q.shape, jnp.float32)
    return attention_blocks.accumulate_gradients(
        zeros, *given, lse, out_dot(out, out), out, pairs, causal=True
    )


def check_costs(program):
    """All that a program does has a cost, its kernels' included."""
    costs = estimate(program.as_text(), CHIPS["v5p"])
    assert costs.kernel_seconds > 0
    assert not costs.uncosted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "tokens", "head_size", "dtype"),
    [
        ("v5p:2x2x1", 4096, 128, "bfloat16"),
        ("v5p:2x2x1", 4096, 64, "bfloat16"),  # padded
        ("v6e:2x2", 32768, 128, "bfloat16"),
        ("v5p:2x2x1", 256, 128, "float32"),
    ],
)
def test_the_delta_rule_compiles_for_a_tpu_and_holds_no_more_than_a_state_a_chunk(
    topology, tokens, head_size, dtype
):
    keys, values = ((1, tokens, heads, head_size) for heads in (16, 32))
    gates = ((1, tokens, 32), jnp.float32)
    program = compiled(
        delta_rule_gradients,
        topology,
        (keys, dtype),
        (keys, dtype),
        (values, dtype),
        gates,
        gates,
        ((1, tokens), jnp.int32),
    )
    check_costs(program)
    size = jnp.dtype(dtype).itemsize
    states = 32 * tokens // 64 * 128 * 128 * size
    inputs = tokens * (2 * 16 + 2 * 32) * 128 * size
    # Beside the states, inverses of a quarter of their size, and gates, copies of inputs.
    assert program.memory_analysis().temp_size_in_bytes < 2 * states + 4 * inputs


HEADS = (1, 128, 2, 128), None  # None: the dtype under test
GATES = (1, 128, 2), "float32"
SEGMENTS = (1, 128), "int32"
HEADS_FIRST = (1, 2, 128, 128), None
QUERIES, KEYS = ((2, 1, 1, 2, 128, 128), None), ((2, 1, 1, 128, 128), None)
ROWS_WEIGHTS = [((64, 128), None), ((64,), "float32")]
MATRICES_SIZES = [((4, 2, 128, 256), None), ((4, 256, 128), None), ((4,), "int32")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("gradients", "arrays"),
    [
        (delta_rule_gradients, [HEADS, HEADS, HEADS, GATES, GATES, SEGMENTS]),
        (attention_gradients, [HEADS, HEADS, HEADS, SEGMENTS]),
        (block_gradients, [QUERIES, KEYS, KEYS, ((2, 1, 128), "int32")]),
        (conv_gradients, [HEADS_FIRST, ((4, 2, 128), None), SEGMENTS, HEADS_FIRST]),
        (expert_gradients, ROWS_WEIGHTS + MATRICES_SIZES),
    ],
)
def test_kernels_have_no_64_bit_numbers_under_x64(gradients, arrays, dtype):
    with jax.enable_x64(True):
        lowered(gradients, "v5p:2x2x1", *((shape, of or dtype) for shape, of in arrays))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "tokens", "size", "dtype"),
    [
        ("v5p:2x2x1", 4096, 128, "bfloat16"),
        ("v6e:2x2", 1000, 128, "bfloat16"),
        ("v5e:2x2", 512, 256, "float32"),
    ],
)
def test_the_convolution_compiles_for_a_tpu_and_holds_nothing(topology, tokens, size, dtype):
    heads = (1, 32, tokens, size), dtype
    program = compiled(
        conv_gradients,
        topology,
        heads,
        ((4, 32, size), jnp.float32),
        ((1, tokens), jnp.int32),
        heads,
    )
    check_costs(program)
    if tokens % 512 == 0:  # else inputs are padded to whole blocks
        # Which taps are a token's own, spread over the lanes, and gradients of taps by block.
        lanes, taps = tokens * 128 * 4, tokens // 512 * 32 * 8 * size * 4
        assert program.memory_analysis().temp_size_in_bytes < 2 * (lanes + taps)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "tokens"), [("v5p:2x2x1", 4096), ("v6e:2x2", 32768)])
def test_attention_compiles_for_a_tpu_and_holds_no_scores(topology, tokens):
    q, kv = ((1, tokens, heads, 256) for heads in (16, 2))
    program = compiled(
        attention_gradients,
        topology,
        *((x, jnp.bfloat16) for x in (q, kv, kv)),
        ((1, tokens), jnp.int32),
    )
    check_costs(program)
    # Queries, outputs, their gradients and copies; float32 norms of 128 lanes.
    assert program.memory_analysis().temp_size_in_bytes < 8 * 2 * tokens * 16 * 256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "heads", "tokens", "largest"),
    [
        # XLA's operations need 2.0 GB for the delta rule, 0.77 for attention.
        (split_delta_rule, [(16, 128), (16, 128), (32, 128), (32,), (32,)], 32768, 0.7e9),
        (split_attention, [(16, 256), (2, 256), (2, 256)], 32768, 0.5e9),
        # Over 8,000 pairs of blocks, whose indices have to fit a chip's memory for scalars.
        (split_attention, [(16, 256), (2, 256), (2, 256)], 262144, 4e9),
    ],
)
def test_rows_split_over_tpus_take_kernels(op, heads, tokens, largest):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, context=4), tpu.devices("v5p:2x2x1"))
    here = jax.NamedSharding(mesh, jax.P(None, "context"))
    dtypes = [jnp.bfloat16 if len(x) == 2 else jnp.float32 for x in heads] + [jnp.int32]
    arrays = [
        jax.ShapeDtypeStruct((1, tokens, *x), dtype, sharding=here)
        for x, dtype in zip([*heads, ()], dtypes, strict=True)
    ]

    def loss(*arrays):
        return op(*arrays).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=range(len(heads))), out_shardings=here)
        program = step.lower(*arrays).compile()
    check_costs(program)
    assert program.memory_analysis().peak_memory_in_bytes < largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "D", "F", "dtype"),
    [
        ("v5p:2x2x1", 2048, 512, "bfloat16"),
        ("v6e:2x2", 2048, 512, "bfloat16"),
        # The widest that `can_compile` lets through.
        ("v5p:2x2x1", 1024, 1152, "bfloat16"),
        ("v5p:2x2x1", 1024, 512, "float32"),
    ],
)
def test_experts_compile_for_a_tpu_and_hold_nothing_between_their_products(topology, D, F, dtype):
    R, E, size = 40960, 8, jnp.dtype(dtype).itemsize
    assert can_compile(D, F, jnp.dtype(dtype))
    program = compiled(
        expert_gradients,
        topology,
        ((R, D), dtype),
        ((R,), jnp.float32),
        ((E, 2, D, F), dtype),
        ((E, F, D), dtype),
        ((E,), jnp.int32),
    )
    check_costs(program)
    # The gradient of what they give, a copy of rows in the layout of the kernels, and of what comes
    # back; the products would be another half each.
    assert program.memory_analysis().temp_size_in_bytes < 3.2 * size * R * D
