"""Scores and continuations on one device and on meshes of eight; prints how they differ as JSON."""

import json
import os
import pathlib
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from oracles import random_model, small_config  # noqa: E402
from split_model import SIZES, mesh_of  # noqa: E402

from qwen3next_jax.data.tokenizer import load_tokenizer  # noqa: E402
from qwen3next_jax.evaluation.evaluator import Evaluator  # noqa: E402
from qwen3next_jax.parallel.mesh import no_mesh, parameter_shardings  # noqa: E402


def main():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, n).tolist() for n in (3, 70, 65, 30, 99)]
    model = random_model(small_config(**{**SIZES, "vocab_size": 264}), scale=0.2)
    tokenizer = load_tokenizer("bytes")

    def evaluate(model, batch_size):
        evaluator = Evaluator(model, tokenizer, batch_size=batch_size)
        return evaluator.score(rows), evaluator.generate(rows[:2], max_new_tokens=8)

    scores, text = evaluate(model, 1)
    graph, params = nnx.split(model)
    found = {}
    for name in ("fsdp", "expert", "context", "tensor_fsdp"):
        mesh = mesh_of(name)
        split = nnx.merge(graph, jax.device_put(params, parameter_shardings(params, mesh)))
        found[name] = compare(scores, text, *evaluate(split, 0))
        if name == "expert":  # as the training loop calls it
            with jax.set_mesh(mesh), no_mesh():
                found["in a run's mesh"] = compare(scores, text, *evaluate(split, 4))
        if name == "context":  # as a user's program may
            with jax.set_mesh(mesh):
                found["in the caller's mesh"] = compare(scores, text, *evaluate(split, 0))
    print(json.dumps(found))


def compare(want, text, got, other_text):
    losses, others = (np.concatenate([s.losses for s in x]) for x in (want, got))
    greedy, other = (np.concatenate([s.margins == 0 for s in x]) for x in (want, got))
    difference = float(np.abs(losses - others).max())
    return difference, text == other_text, bool((greedy == other).all())


if __name__ == "__main__":
    main()
