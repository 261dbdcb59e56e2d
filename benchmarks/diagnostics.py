"""Cost of `train.diagnostics`: the step with it and without, alternating in one process.

    python benchmarks/diagnostics.py [--config=tiny] [--steps=20] [--config.KEY=V ...]

Both programs are compiled first. Then they take steps in pairs, in alternating order, on the same
batch and from the same initial state; the cost is the median over pairs of the ratio of their
times. Compilation is timed as well. The batch is random tokens in documents of 128.
"""

import argparse
import importlib
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
from flax import nnx

from qwen3next_jax.config import RunConfig
from qwen3next_jax.parallel.mesh import make_mesh
from qwen3next_jax.training.loss import complete_batch
from qwen3next_jax.training.program import make_program, new_model
from qwen3next_jax.training.step import initial_state


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="of configs/")
    parser.add_argument("--steps", type=int, default=20, help="of each")
    parser.add_argument("--json", action="store_true")
    args, changes = parser.parse_known_args()
    config = importlib.import_module(f"configs.{args.config}").get_config()
    for change in changes:
        key, value = change.removeprefix("--config.").split("=")
        section, name = key.split(".")
        config[section][name] = type(config[section][name])(value)

    sides = {}
    for on in (True, False):
        config.train.diagnostics = on
        run = RunConfig.from_dict(config.to_dict())
        mesh = make_mesh(run.mesh)
        with jax.set_mesh(mesh):
            sides[on] = prepare(run, mesh)
    times = {True: [], False: []}
    for i in range(args.steps):
        for on in (True, False) if i % 2 else (False, True):
            times[on].append(take(sides[on]))
    on, off = (np.array(times[key]) for key in (True, False))
    ratios = on / off - 1
    result = {
        "step_seconds_on": float(np.median(on)),
        "step_seconds_off": float(np.median(off)),
        "cost": float(np.median(ratios)),
        "cost_of_fastest": float(on.min() / off.min() - 1),
        "cost_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "compile_seconds_on": sides[True]["seconds"],
        "compile_seconds_off": sides[False]["seconds"],
    }
    for name, value in result.items():
        print(f"{name:22} {value}")
    if args.json:
        print(json.dumps(result))


def prepare(config, mesh):
    """A compiled step, its state and a batch."""
    program = make_program(config, mesh)
    params = nnx.state(jax.jit(lambda: nnx.state(new_model(config)))())
    shape = (config.train.global_batch_size, config.train.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    segments = np.broadcast_to(1 + np.arange(shape[1]) // 128, shape).astype(np.int32)
    batch = jax.tree.map(np.asarray, complete_batch(tokens, segments))
    state = initial_state(params, program.optimizer, config)
    start = time.perf_counter()
    compiled = program.step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    side = {"step": compiled, "state": state, "batch": batch, "seconds": seconds}
    take(side), take(side)
    return side


def take(side):
    start = time.perf_counter()
    side["state"], metrics = side["step"](side["state"], side["batch"])
    jax.block_until_ready((side["state"], metrics))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
