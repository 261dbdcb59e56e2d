"""What the tests of meshes share: a model that every axis can split, and packed documents.

Run as a program on eight devices it computes losses and gradients on one of them and on the meshes
that are named, and prints how they differ and what the compiled programs send around.
"""

import collections
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracles import quick_jit, random_model, small_config

from qwen3next_jax.config import MeshConfig
from qwen3next_jax.parallel.mesh import BATCH, make_mesh, parameter_shardings
from qwen3next_jax.training.diagnostics import layer_metrics
from qwen3next_jax.training.loss import loss

MESHES = {
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "expert": dict(expert=8),
    "context": dict(context=8),
    "tensor_fsdp": dict(tensor=2, fsdp=4),
    "data_expert": dict(data=2, expert=4),
    "expert_context": dict(expert=2, context=4),
    "fsdp_expert_context": dict(fsdp=2, expert=2, context=2),
}


# Head sizes such that no query or key of a delta layer is short by chance: the gradient through its
# length would amplify rounding errors.
SIZES = dict(vocab_size=64, num_experts=16, linear_key_head_dim=16, linear_value_head_dim=16)
# A model and a batch in which no token is undecided between its third and its fourth expert.
SEED = 36


def mesh_of(name, devices=None):
    sizes = {"data": 1, "fsdp": 1, **MESHES[name]}
    return make_mesh(MeshConfig(**sizes), devices)


def config(**changes):
    return small_config(mtp_steps=1, **{**SIZES, **changes})


def model(seed=SEED, scale=0.3):
    return random_model(config(), seed=seed, scale=scale)


def batch(rows=8, tokens=64, seed=SEED):
    """Packed documents, of which some cross the boundaries of context shards, and padding."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, tokens), np.int32)
    for row in segments:
        ends = np.sort(rng.choice(np.arange(3, tokens - 5), 4, replace=False))
        row[: ends[-1]] = 1 + np.searchsorted(ends, np.arange(ends[-1]), side="right")
    text = rng.integers(0, 64, (rows, tokens)).astype(np.int32)
    starts = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    index = np.broadcast_to(np.arange(tokens), segments.shape)
    after = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": text,
        "targets": np.pad(text[:, 1:], ((0, 0), (0, 1))),
        "loss_weights": ((after == segments) & (segments != 0)).astype(np.float32),
        "segment_ids": segments,
        "positions": (index - np.maximum.accumulate(np.where(starts, index, 0), 1)).astype(
            np.int32
        ),
    }


def loss_and_gradients(graph, chunk=16):
    def value(params, batch):
        value, metrics = loss(
            nnx.merge(graph, params), batch, z_weight=1e-3, chunk=chunk, observe=True
        )
        return value, metrics | layer_metrics(metrics.pop("observed"), metrics["assignments"])

    return jax.value_and_grad(value, has_aux=True)


def place(params, batch, mesh):
    params = jax.device_put(params, parameter_shardings(params, mesh))
    return params, jax.device_put(batch, jax.NamedSharding(mesh, BATCH))


def train(value_and_grad, params, batch, steps=20, rate=0.1):
    """Losses under plain gradient descent."""

    @jax.jit
    def descend(params, grads):
        return jax.tree.map(lambda p, g: p - rate * g, params, grads)

    losses = []
    for _ in range(steps):
        (value, _), grads = value_and_grad(params, batch)
        params = jax.block_until_ready(descend(params, grads))
        losses.append(float(value))
    return losses


def compute(value_and_grad, params, young, batch):
    """Loss, metrics, gradients by path, and losses from a younger model's weights on."""
    (value, metrics), grads = value_and_grad(params, batch)
    grads = {"/".join(map(str, p)): np.asarray(g[...]) for p, g in nnx.to_flat_state(grads)}
    metrics = {k: np.asarray(v).tolist() for k, v in metrics.items()}
    losses = train(value_and_grad, young, batch)
    return {"loss": float(value), "metrics": metrics, "losses": losses}, grads


def collectives(text):
    """How often each collective occurs, and those whose result is a whole expert table."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    c = config()
    E, D, F = c.num_experts, c.hidden_size, c.moe_intermediate_size
    tables = [
        table
        for f in (F, F // 2)  # a device of `tensor` has half of the columns
        for table in (f"[{E},2,{D},{f}]", f"[{E},{f},{D}]", f"[{E},{D},{2 * f}]")
    ]
    whole = [f"{kind} {shape}" for shape, kind in found if any(t in shape for t in tables)]
    return dict(collections.Counter(kind for _, kind in found)), whole


def main(names):
    graph, params = nnx.split(model())
    given, top_k, gaps = batch(), jax.lax.top_k, []

    def watched_top_k(p, k):
        values, experts = top_k(p, k + 1)
        gap = jnp.where(given["segment_ids"] != 0, values[..., k - 1] - values[..., k], 1)
        jax.debug.callback(lambda g: gaps.append(float(g)), gap.min())
        return values[..., :k], experts[..., :k]

    jax.lax.top_k = watched_top_k
    (value_and_grad := quick_jit(loss_and_gradients(graph)))(params, given)
    jax.effects_barrier()
    gap = min(gaps)
    jax.lax.top_k = top_k
    # Descent comes by tokens that are undecided between two experts. With small weights, as at the
    # start of a run, it matters little which one they take.
    young = nnx.state(model(scale=0.05))
    one, expected = compute(value_and_grad, params, young, given)
    print(json.dumps({"gap": gap, **one}), flush=True)
    for name in names:
        mesh = mesh_of(name)
        with jax.set_mesh(mesh):
            placed, placed_batch = place(params, given, mesh)
            placed_young, _ = place(young, given, mesh)
            compiled = quick_jit(loss_and_gradients(graph)).lower(placed, placed_batch).compile()
            result, grads = compute(compiled, placed, placed_young, placed_batch)
        counts, whole = collectives(compiled.as_text())
        errors = {
            path: float(np.linalg.norm(grad - expected[path]) / np.linalg.norm(expected[path]))
            for path, grad in grads.items()
        }
        result |= {"gradients": errors, "collectives": counts, "whole_tables": whole}
        print(json.dumps({"mesh": name, **result}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
