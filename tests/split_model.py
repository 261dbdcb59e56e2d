"""What the tests of meshes share: a model that every axis can split, and packed documents."""

import jax
import numpy as np
from flax import nnx
from oracles import random_model, small_config

from qwen3next_jax.config import MeshConfig
from qwen3next_jax.parallel.mesh import BATCH, make_mesh, parameter_shardings
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


def mesh_of(name, devices=None):
    sizes = {"data": 1, "fsdp": 1, **MESHES[name]}
    return make_mesh(MeshConfig(**sizes), devices)


def config(**changes):
    return small_config(mtp_steps=1, **{"vocab_size": 64, "num_experts": 16, **changes})


def model(seed=0, **options):
    return random_model(config(), seed=seed, scale=0.3, **options)


def batch(rows=16, tokens=128, seed=0):
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
        return loss(nnx.merge(graph, params), batch, z_weight=1e-3, chunk=chunk)

    return jax.value_and_grad(value, has_aux=True)


def place(params, batch, mesh):
    params = jax.device_put(params, parameter_shardings(params, mesh))
    return params, jax.device_put(batch, jax.NamedSharding(mesh, BATCH))
