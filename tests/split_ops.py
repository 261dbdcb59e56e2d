"""Runs the mixers' ops on meshes of 8 virtual devices; prints errors, memory, collectives as JSON.

`test_context.py` starts it once: the number of devices is fixed when JAX starts.
"""

import collections
import importlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles import quick_jit, random_module, relative_error, small_config
from test_delta_rule import recurrence, recurrence_gradients

from qwen3next_jax import ops
from qwen3next_jax.config import MeshConfig
from qwen3next_jax.model.gated_attention import GatedAttention
from qwen3next_jax.model.gated_delta_net import GatedDeltaNet
from qwen3next_jax.model.moe import SparseMoE
from qwen3next_jax.ops.pallas import attention_blocks
from qwen3next_jax.ops.pallas.attention import KEPT
from qwen3next_jax.parallel import context, vocabulary
from qwen3next_jax.parallel.mesh import make_mesh

MESHES = {
    "context 2": dict(context=2),
    "context 8": dict(context=8),
    "context 4, tensor 2": dict(context=4, tensor=2),
    "fsdp 2, context 2, tensor 2": dict(fsdp=2, context=2, tensor=2),
    "context 2, tensor 4": dict(context=2, tensor=4),  # twice the KV heads
    "fsdp 2, tensor 4": dict(fsdp=2, tensor=4),  # with whole rows
}
blocks = importlib.import_module("qwen3next_jax.ops.attention")  # not the function of that name
T = 160  # over 8 ranks 20 each: neither chunks nor blocks divide it


def mesh_of(sizes):
    sizes = {"data": 1, "fsdp": 1, **sizes}
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


def documents(*lengths):
    """Ids of documents one after the other; a negative length is padding."""
    ids = [np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(lengths)]
    return np.pad(np.concatenate(ids), (0, T - sum(map(abs, lengths))))


ROWS = {
    "one document": documents(T),
    "crossing every boundary": documents(15, 10, 20, 1, 2, 30, 70, 12),
    "ending at the boundaries": documents(20, 20, 40, 80),
    "one over several ranks": documents(5, 131, 24),
    "padding between and behind": documents(25, -5, 3, -47, 33, -7, 10),  # whole ranks of it
    "padding in front": documents(-45, 60, 20),
    "padding alone": documents(-T),
    "strong decay": documents(33, 100),
}
SEGMENTS = np.stack(list(ROWS.values())).astype(np.int32)


def float64(rng, *shape):
    """What float32 can hold, so that only the computation is compared."""
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64)


def delta_arrays():
    rng = np.random.default_rng(0)
    B, K, N, H, P = len(ROWS), 4, 8, 8, 12
    q, k, v, state = (
        float64(rng, *shape) for shape in ((B, T, K, H), (B, T, K, H), (B, T, N, P), (B, N, H, P))
    )
    q *= H**-0.5 / np.linalg.norm(q, axis=-1, keepdims=True)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g = -np.exp(rng.uniform(-5, 1, (B, T, N)))
    g[-1, 0::2], g[-1, 1::2] = -30, -0.05
    beta = rng.uniform(0.05, 0.95, (B, T, N))
    arrays = [x.astype(np.float32).astype(np.float64) for x in (q, k, v, g, beta, state)]
    return arrays, (float64(rng, *v.shape), float64(rng, *state.shape))


def on_mesh(mesh, function, arrays, cotangents):
    def f(arrays, cotangents):
        values, vjp = jax.vjp(function, *arrays)
        return values, vjp(cotangents)

    arrays, cotangents = jax.tree.map(jnp.float32, (arrays, cotangents))
    with jax.set_mesh(mesh):
        return quick_jit(f)(arrays, cotangents)


def row_errors(got, want, floors=None):
    """The largest error of any row of the batch, relative to that row."""
    floors = np.zeros(len(got)) if floors is None else floors
    return {
        row: relative_error(*pair, floor)
        for row, *pair, floor in zip(ROWS, got, want, floors, strict=True)
    }


def meshes(packed, implementation=None):
    """All of them for the default on packed rows; one for the rest, which differs in little."""
    whole = packed and implementation is None
    return MESHES if whole else {"context 4, tensor 2": MESHES["context 4, tensor 2"]}


def delta_errors(packed, implementation=None):
    names = ["out", "final state", "q", "k", "v", "g", "beta", "initial state"]
    arrays, cotangents = delta_arrays()
    ids = SEGMENTS if packed else np.ones_like(SEGMENTS)
    segments = jnp.asarray(SEGMENTS) if packed else None
    want = *recurrence(*arrays, ids), *recurrence_gradients(*arrays, ids, *cotangents)
    # Under strong decay the true dg is a small remainder: measured against the terms it is left of.
    floors = sum(
        np.linalg.norm((x * dx).reshape(len(x), -1), axis=1)
        for x, dx in zip(arrays[:2], want[2:4], strict=True)
    )

    def rule(q, k, v, g, beta, state):
        return context.gated_delta_rule(
            q,
            k,
            v,
            log_decay=g,
            beta=beta,
            segment_ids=segments,
            initial_state=state,
            implementation=implementation,
        )

    for name, sizes in meshes(packed, implementation).items():
        values, grads = on_mesh(mesh_of(sizes), rule, arrays, cotangents)
        yield (
            name,
            {
                part: row_errors(x, y, floors if part == "g" else None)
                for part, x, y in zip(names, (*values, *grads), want, strict=True)
            },
        )


def attention_errors(packed, implementation=None):
    rng = np.random.default_rng(0)
    B, N, K, H, P = len(ROWS), 8, 2, 8, 12
    arrays = [float64(rng, B, T, n, size) for n, size in ((N, H), (K, H), (K, P))]
    cotangent = float64(rng, B, T, N, P)
    segments = jnp.asarray(SEGMENTS) if packed else None

    def plain(*arrays):
        return ops.attention(*arrays, segment_ids=segments, implementation="reference")

    def split(*arrays):
        return context.attention(*arrays, segment_ids=segments, implementation=implementation)

    out, grads = on_mesh(mesh_of({}), plain, arrays, cotangent)
    want = out, *grads
    for name, sizes in meshes(packed, implementation).items():
        out, grads = on_mesh(mesh_of(sizes), split, arrays, cotangent)
        yield (
            name,
            {
                part: row_errors(x, y)
                for part, x, y in zip(["out", "q", "k", "v"], (out, *grads), want, strict=True)
            },
        )


def conv_errors(packed):
    rng = np.random.default_rng(0)
    arrays = [float64(rng, len(ROWS), T, 4, 6), float64(rng, 4, 4, 6)]
    arrays.append(float64(rng, len(ROWS), 3, 4, 6))
    cotangent = float64(rng, *arrays[0].shape)
    segments = jnp.asarray(SEGMENTS) if packed else None

    def plain(x, kernel, tail):
        return ops.causal_conv(x, kernel, segment_ids=segments, tail=tail)

    def split(x, kernel, tail):
        return context.causal_conv(x, kernel, segment_ids=segments, tail=tail)

    out, (dx, dw, dt) = on_mesh(mesh_of({}), plain, arrays, cotangent)
    for name, sizes in meshes(packed).items():
        got, (gx, gw, gt) = on_mesh(mesh_of(sizes), split, arrays, cotangent)
        yield (
            name,
            {
                "out": row_errors(got, out),
                "x": row_errors(gx, dx),
                "tail": row_errors(gt, dt),
                "kernel": {"all": relative_error(gw, dw)},
            },
        )


def module_errors():
    """The modules whole, without positions or segment ids: they count from the row's start."""
    config = small_config()
    x = jnp.asarray(
        np.random.default_rng(0).standard_normal((2, 64, config.hidden_size)), "float32"
    )
    for module in (GatedAttention, GatedDeltaNet, SparseMoE):
        mixer = random_module(nnx.eval_shape(lambda m=module: m(config, rngs=nnx.Rngs(0))))
        graph, params = nnx.split(mixer)

        def f(params, x, graph=graph, module=module):
            y, vjp = jax.vjp(lambda *given: nnx.merge(graph, given[0])(given[1]), params, x)
            # The mixers' gradients are those of their ops, above.
            return [y, *(jax.tree.leaves(vjp(jnp.cos(y))) if module is SparseMoE else ())]

        want = quick_jit(f)(params, x)
        with jax.set_mesh(mesh_of(MESHES["context 4, tensor 2"])):
            got = quick_jit(f)(params, x)
        yield module.__name__, max(map(relative_error, got, want))


def vocabulary_errors():
    """Embedding and cross-entropy with their gradients, each of the table and the head."""
    rng = np.random.default_rng(0)
    table, head = float64(rng, 32, 8), float64(rng, 8, 32)
    tokens, targets = jnp.asarray(rng.integers(0, 32, (2, 2, 16)), jnp.int32)
    weights = jnp.asarray(rng.choice([0, 0.5, 1], (2, 16)), jnp.float32)

    def total(table, head):
        hidden = vocabulary.embed(tokens, table, dtype=jnp.dtype("float32"))
        return vocabulary.cross_entropy(hidden, head, targets, weights, chunk=3)[0]

    def f(cotangent, sizes):
        value, grads = on_mesh(mesh_of(sizes), total, (table, head), cotangent)
        return value, *grads

    want = f(3.0, {})
    got = f(3.0, MESHES["fsdp 2, context 2, tensor 2"])
    return dict(zip(("sum", "table", "head"), map(relative_error, got, want), strict=True))


def compiled(op, sizes, tokens):
    """Value and gradients of an op over one long row, compiled for a mesh; bfloat16 as in use."""
    shape = jax.ShapeDtypeStruct
    segments = shape((1, tokens), jnp.int32)

    def array(*heads):
        return shape((1, tokens, *heads), jnp.bfloat16)

    def delta(segments, q, k, v, g, beta):
        out, _ = context.gated_delta_rule(q, k, v, log_decay=g, beta=beta, segment_ids=segments)
        return out.astype(jnp.float32).sum()

    def attend(segments, *arrays):
        return context.attention(*arrays, segment_ids=segments).astype(jnp.float32).sum()

    if op == "delta":
        f, arrays = delta, [array(2, 16), array(2, 16), array(4, 16), array(4), array(4)]
    else:
        f, arrays = attend, [array(4, 32), array(1, 32), array(1, 32)]
    mesh = mesh_of(sizes)
    sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
    given = jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=sharding), (segments, *arrays))
    step = jax.grad(f, argnums=tuple(range(1, len(given))))
    with jax.set_mesh(mesh):
        return jax.jit(step, out_shardings=sharding).lower(*given).compile()


def sends(policy):
    """How often attention's ways forth and back send something, written out in their trace."""

    def attend(*arrays):
        return context.attention(*arrays).astype(jnp.float32).sum()

    again = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(policy))
    arrays = [jax.ShapeDtypeStruct((1, 256, n, 32), jnp.float32) for n in (4, 1, 1)]
    with jax.set_mesh(mesh_of(dict(context=8))):
        return str(jax.make_jaxpr(jax.grad(again, argnums=(0, 1, 2)))(*arrays)).count("ppermute[")


def collectives(text):
    """How many of each kind, and the elements of the largest, by kind."""
    found = collections.defaultdict(list)
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for shape, kind in re.findall(rf"= \(?\w+\[([\d,]*)\][^=]*? ({kinds})(?:-start)?\(", text):
        found[kind].append(int(np.prod([int(n) for n in shape.split(",") if n])))
    return {kind: [len(sizes), max(sizes)] for kind, sizes in found.items()}


def main():
    blocks._BLOCK = attention_blocks.BLOCK = 16  # several blocks a piece
    report = {
        f"{op} {'packed' if packed else 'whole'}": dict(errors(packed))
        for op, errors in (
            ("delta", delta_errors),
            ("attention", attention_errors),
            ("conv", conv_errors),
        )
        for packed in (True, False)
    }
    report["delta pallas"] = dict(delta_errors(True, "pallas"))
    report["delta reference"] = dict(delta_errors(True, "reference"))
    report["attention pallas"] = dict(attention_errors(True, "pallas"))
    report["modules"] = dict(module_errors())
    report["vocabulary"] = vocabulary_errors()
    blocks._BLOCK = 128
    for op in ("delta", "attention"):
        programs = {n: compiled(op, dict(context=n), 4096) for n in (1, 2, 8)}
        report[f"{op} bytes"] = {
            n: program.memory_analysis().temp_size_in_bytes for n, program in programs.items()
        }
        report[f"{op} collectives"] = collectives(programs[8].as_text())
    report["attention sends"] = {policy: sends(policy) for policy in ("nothing", KEPT)}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
