"""Measures the authors' claim: a sparse hybrid against a dense model of equal quality.

    python benchmarks/claims.py --contexts=1024,4096,16384
    python benchmarks/claims.py --contexts=65536 --measure=read,decode

Qwen3-Next-80B-A3B is said to match Qwen3-32B with less than a tenth of its training and, beyond 32K
tokens of context, more than ten times its throughput. Here the small sparse hybrid is compared with
a dense model with the same ratio of parameters (`shapes.py`): a training step of one row, in
alternation, then prefill and decoding of one side after the other. Whether small models of these
sizes are equal in quality is not measured. With it comes the arithmetic of the full sizes:
operations a token, and bytes of weights and cache that decoding a token reads. A small sparse model
gains less than the large one, since 0.24 of its parameters are active, but only 0.05 of the 80B
model's. Medians over --rounds. With --json the last line is one JSON object.
"""

import argparse
import importlib
import json
import statistics

import jax
import numpy as np
from decode import decode_times
from flax import nnx
from shapes import config
from train_step import Apart, Ours, make_parser

from qwen3next_jax.config import RunConfig
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.plan.costs import active_parameters, serving_bytes, train_flops
from qwen3next_jax.training.program import abstract_model

SIDES = {"hybrid": "small", "dense": "dense"}
FULL = {"hybrid": "configs.80b_a3b", "dense": "configs.qwen3_32b"}
UNITS = {"train": "tokens/s trained", "read": "tokens/s read", "decode": "tokens/s written"}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", default="1024,4096", help="lengths, separated by commas")
    parser.add_argument("--measure", default=",".join(UNITS), help=f"of {', '.join(UNITS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--remat", default="none", help='"layer" to train on long rows')
    parser.add_argument("--new", type=int, default=32, help="tokens generated after a prompt")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.measure.split(",")) - set(UNITS):
        parser.error(f"unknown measures {sorted(unknown)}; there are {', '.join(UNITS)}")
    points = []
    for context in map(int, args.contexts.split(",")):
        point = {"context": context, **measure(args, context), "full_size": arithmetic(context)}
        points.append(point)
        print(f"{context} tokens of context")
        for name, rates in point.items():
            if name in UNITS:
                print(f"{UNITS[name]:>18}: " + versus(rates))
        full = point["full_size"]
        print(f"{'full size, less':>18}: " + ", ".join(f"{k} {v:.1f}" for k, v in full.items()))
    if args.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "points": points}))


def measure(args, context):
    """Tokens a second of both sides, by measure."""
    wanted, rates = args.measure.split(","), {}
    if "train" in wanted:
        rates["train"] = {n: context / t for n, t in training_times(args, context).items()}
    if {"read", "decode"} & set(wanted):
        times = {name: text_times(shape, context, args) for name, shape in SIDES.items()}
        rates["read"] = {name: context / first for name, (first, _) in times.items()}
        rates["decode"] = {name: 1 / step for name, (_, step) in times.items()}
    return {name: rates[name] for name in wanted}


def training_times(args, context):
    rng, sides = np.random.default_rng(0), {}
    for name, shape in SIDES.items():
        given = f"--shape={shape} --batch=1 --seq={context} --remat={args.remat}"
        options = make_parser().parse_args(given.split())
        sides[name] = Apart(Ours, options, None)
        sides[name].call("prepare", rng.integers(0, config(shape).vocab_size, (1, context)))
    times = {name: [] for name in sides}
    for i in range(args.rounds):
        for name in sorted(sides, reverse=i % 2 == 1):
            times[name].append(sides[name].call("step_seconds"))
    for side in sides.values():
        side.stop()
    return {name: statistics.median(t) for name, t in times.items()}


def text_times(shape, context, args):
    model = Qwen3Next(config(shape, mtp_steps=0), rngs=nnx.Rngs(0)).unstacked()
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, context))
    return decode_times(model, prompt.tolist(), args)


def arithmetic(context):
    """The ratios of dense to hybrid at full size, in bfloat16."""
    runs = {name: full_size(module) for name, module in FULL.items()}
    needs = {
        "operations a token": lambda run: train_flops(run.model, context),
        "bytes for a token written": lambda run: bytes_read(run, context),
    }
    return {name: need(runs["dense"]) / need(runs["hybrid"]) for name, need in needs.items()}


def full_size(module):
    run = importlib.import_module(module).get_config()
    run.model.mtp_steps = 0
    return RunConfig.from_dict(run.to_dict())


def bytes_read(run, context):
    """Bytes of active weights and of the cache, to decode one more token of one sequence."""
    per_token, states = serving_bytes(run.model)
    cache = per_token * context + 2 * states  # states are read and written
    return 2 * active_parameters(abstract_model(run)[1], run.model) + cache


def versus(rates):
    return (
        f"{rates['hybrid']:8.1f} hybrid, {rates['dense']:8.1f} dense, "
        f"{rates['hybrid'] / rates['dense']:.2f} times"
    )


if __name__ == "__main__":
    main()
