"""Compares experts split over 4 virtual devices with whole ones, by both exchanges.

`test_expert.py` starts it once: the number of devices is fixed when JAX starts.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from oracles import small_config

from qwen3next_jax.config import MeshConfig
from qwen3next_jax.model.moe import SparseMoE
from qwen3next_jax.parallel.expert import apply_experts, apply_split_experts
from qwen3next_jax.parallel.mesh import make_mesh

n, E, A, M, D = 4, 8, 3, 20, 6  # devices, experts, choices, tokens of a device, their size
mesh = jax.make_mesh((n,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


x, weights, table, d_y = draw(n * M, D), draw(n * M, A), draw(E, D), draw(n * M, D)
# Uneven loads: low numbers are chosen more often.
experts = jnp.argsort(draw(n * M, E) + 0.3 * jnp.arange(E), axis=1)[:, :A]


def ragged_all_to_all(operand, output, first, size, place, came, *, axis_name):
    """As documented, of gathers: the CPU has none of its own."""
    operands, firsts, sizes, places = (
        jax.lax.all_gather(a, axis_name) for a in (operand, first, size, place)
    )
    me, index = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    slices = len(first) // n
    if len(output) == M * A + 1:  # on the way back, what was not sent must not be read
        output = output.at[:-1].set(jnp.nan)
    sent = jnp.split(came, n)
    for source in range(n):
        for i in range(slices):
            piece = me * slices + i
            at = index - places[source, piece]
            there = operands[source][(firsts[source, piece] + at).clip(0, len(operand) - 1)]
            here = (at >= 0) & (at < jnp.minimum(sizes[source, piece], sent[source][i]))
            output = jnp.where(here[:, None], there, output)
    return output


def compute(table):
    def rows_of(rows, weights, sizes):
        of = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows)), side="right")
        return weights[:, None] * jnp.sin(rows * table[of.clip(max=len(table) - 1)])

    return rows_of


@functools.partial(jax.jit, static_argnums=0)
def run(f):
    """The number of dropped assignments of f, and its outputs with all gradients."""
    y, back, dropped = jax.vjp(f, x, weights, table, has_aux=True)
    return dropped, (y, *back(d_y))


def whole(x, weights, table, experts=experts):
    return apply_experts(x, experts, weights, compute(table), num_experts=E), 0


def split(x, weights, table, experts=experts, **options):
    def local(x, experts, weights, table):
        y, dropped = apply_split_experts(
            x, experts, weights, compute(table), num_experts=E, axis="expert", **options
        )
        return y, dropped[None]

    return jax.shard_map(
        local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )(x, experts, weights, table)


def check_buffers():
    """Split equals whole where the buffers suffice; what finds no place in them is counted."""
    _, expected = run(whole)
    for factor, alignment in ((-1, 1), (-1, 8), (1.05, 1), (2.5, 4)):
        options = dict(buffer_factor=factor, alignment=alignment)
        (dropped, dense), (_, ragged) = (
            run(functools.partial(split, exchange=exchange, **options))
            for exchange in ("dense", "ragged")
        )
        for a, b in zip(dense, ragged, strict=True):
            np.testing.assert_array_equal(a, b)
        # A device has 2 experts: what comes for them, and what has no place in its buffer.
        came = np.bincount(np.asarray(experts).ravel() // 2, minlength=n)
        room = n * M * 2 if factor == -1 else int(np.ceil(factor * M * A))
        assert dropped.sum() == np.maximum(came - room, 0).sum(), (factor, dropped)
        assert (dropped.sum() > 0) == (factor == 1.05)
        if factor != 1.05:
            for a, b in zip(dense, expected, strict=True):
                # Float32 sums: of three numbers in y, of some thirty, up to ten, in a row of
                # d_table.
                np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)
        else:
            # Each token lost some experts at most, and those that lost none are as before.
            assert (np.abs(dense[0] - expected[0]).max(1) > 1e-6).sum() <= dropped.sum()


def check_padding():
    """Half of each device's tokens are padding, which would all go to the same experts."""
    padding = (jnp.arange(n * M) % M >= M // 2)[:, None]
    fixed = jnp.where(padding, jnp.arange(A), experts)
    room = dict(buffer_factor=2.0, alignment=4)
    _, expected = run(lambda x, w, table: whole(x, jnp.where(padding, 0, w), table, fixed))
    count = jax.jit(lambda experts: split(x, weights, table, experts, **room)[1])
    assert np.asarray(count(fixed)).sum() > 0
    nowhere = jnp.where(padding, E, experts)
    for exchange in ("dense", "ragged"):
        dropped, got = run(lambda *a, e=exchange: split(*a, nowhere, exchange=e, **room))
        assert not np.asarray(dropped).any()
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)


def check_padding_of_a_layer():
    """A layer on a mesh sends no padding: with it, one device's buffer would overflow."""
    config = small_config(num_experts=E)
    layer = SparseMoE(config, rngs=nnx.Rngs(0), moe_buffer_factor=2.0)
    x = jnp.zeros((n, M, config.hidden_size)).at[:, :2].set(draw(n, 2, config.hidden_size))
    segment_ids = jnp.broadcast_to(jnp.arange(M) < 2, (n, M)).astype(jnp.int32)
    expected = layer(x)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, expert=n))):
        apply = jax.jit(lambda ids: layer.with_stats(x, segment_ids=ids))
        y, stats = apply(segment_ids)
        assert not np.asarray(stats.dropped).any()
        np.testing.assert_allclose(y[:, :2], expected[:, :2], atol=1e-6)
        assert np.asarray(apply(jnp.ones_like(segment_ids))[1].dropped).any()


def check_drops_of_a_layer():
    """Where rows are split as well, a layer counts each dropped assignment once."""
    config, factor = small_config(num_experts=E), 1.0
    layer = SparseMoE(config, rngs=nnx.Rngs(0), moe_buffer_factor=factor)
    x = draw(2, 2 * M, config.hidden_size)  # on each device half a row, of M tokens
    chosen = jnp.argsort(-(x @ layer.router[...]), axis=-1)[..., :A]
    # The same halves of both rows share a receive buffer for each half of the experts.
    buffers = (np.asarray(chosen) // (E // 2)).reshape(2, 2, -1).swapaxes(0, 1).reshape(2, -1)
    came = np.array([np.bincount(half, minlength=2) for half in buffers])
    lost = np.maximum(came - math.ceil(factor * M * A), 0).sum()
    assert lost > 0
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, expert=2, context=2))):
        stats = jax.jit(layer.with_stats)(x)[1]
    assert np.asarray(stats.dropped).sum() == lost, (stats.dropped, came)


if __name__ == "__main__":
    jax.lax.ragged_all_to_all = ragged_all_to_all
    check_buffers()
    check_padding()
    check_padding_of_a_layer()
    check_drops_of_a_layer()
