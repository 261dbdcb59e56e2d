"""Training speed of a whole step or of the forward pass, optionally against transformers.

    python benchmarks/train_step.py --batch=4 --seq=512 --vs=transformers
    python benchmarks/train_step.py --batch=1 --seq=4096 --vs=transformers --forward
    python benchmarks/train_step.py --batch=1 --contexts=1024,4096,16384     one row, ever longer
    python benchmarks/train_step.py --batch=1 --contexts=1024,65536 --only=delta    one layer alone
    python benchmarks/train_step.py --batch=1 --contexts=1024,65536 --steps=0       memory, no step

A step is forward, backward, clipping and AdamW, without MTP and diagnostics, as `train.py` compiles
it, on random tokens. With --vs both sides start from the same weights, their first losses are
compared, and they then alternate in turns of three steps, the first of which is not counted;
medians over --steps. Each side has a process of its own, as in use, with huge pages enabled as in
`train.py`. --mesh=data=2 shards the step over two devices; on a CPU they come from
XLA_FLAGS=--xla_force_host_platform_device_count=2. MFU is the rate of the operations that the model
needs (`plan/costs.py`) over that of one large matrix product, measured in the same run. The memory
is what the compiled step allocates, including its state. With --json the last line is one JSON
object.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from decode import reference, seconds
from flax import nnx
from ml_collections import ConfigDict
from ops import product_ceiling
from shapes import SHAPES, config

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import tiny
from qwen3next_jax.checkpoint.hugging_face import load_tensors
from qwen3next_jax.config import RunConfig
from qwen3next_jax.ops.platform import forward_program
from qwen3next_jax.parallel.mesh import make_mesh
from qwen3next_jax.plan.costs import train_flops
from qwen3next_jax.training.loss import complete_batch
from qwen3next_jax.training.program import make_program, new_model
from qwen3next_jax.training.step import initial_state

_IN_A_ROW = 2  # steps counted in a turn
MIXERS = {"delta": "linear_attention", "attention": "full_attention"}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--seq", type=int, default=512, help="tokens a row")
    parser.add_argument("--steps", type=int, default=6, help="counted, of each side")
    parser.add_argument("--compute", default="float32", help="dtype of activations and products")
    parser.add_argument("--remat", default="none")
    parser.add_argument(
        "--loss_chunk",
        type=int,
        help="positions of a row with logits at once; left out, about 512 of all rows together",
    )
    parser.add_argument("--mesh", default="", help="such as data=2, over as many devices")
    parser.add_argument("--forward", action="store_true", help="logits alone, no training")
    parser.add_argument("--vs", choices=["transformers"])
    parser.add_argument("--contexts", help="lengths of a row, separated by commas, in place of one")
    parser.add_argument("--only", choices=MIXERS, help="a model of one layer, with this mixer")
    parser.add_argument(
        "--profile", action="store_true", help="what a step's operations take, on a CPU or GPU"
    )
    parser.add_argument("--json", action="store_true")
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.only and args.vs:
        parser.error("--vs compares whole models; leave out --only")
    if args.vs and args.shape == "dense":
        parser.error("--vs compares Qwen3-Next models; take another --shape")
    if args.steps < 1 and not args.contexts:
        parser.error(f"--steps={args.steps} times nothing; make it 1 or more, or give --contexts")
    result = curve(args) if args.contexts else compare(args)
    if args.json:
        print(json.dumps(result))


def compare(args):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPES[args.shape]["vocab_size"], (args.batch, args.seq))
    theirs = Apart(Theirs, args) if args.vs else None
    ours = Apart(Ours, args, theirs and theirs.call("tensors"), profile=args.profile)
    sides = {"ours": ours} | ({"transformers": theirs} if theirs else {})
    first = {name: side.call("prepare", tokens) for name, side in sides.items()}
    if theirs and not args.forward:
        print("first cross-entropies: " + ", ".join(f"{n} {v:.5f}" for n, v in first.items()))
    times = {name: [] for name in sides}
    for turn in range(-(-args.steps // _IN_A_ROW)):
        for name in sorted(sides, reverse=turn % 2 == 1):
            # Not counted, since memory released during the other side's turn is allocated again,
            # which does not happen in a run.
            sides[name].call("step_seconds")
            times[name] += [sides[name].call("step_seconds") for _ in range(_IN_A_ROW)]
    count, ceiling = tokens.size, ours.call("ceiling")
    needed = count * train_flops(model_config(args), args.seq) / (3 if args.forward else 1)
    result = {
        "shape": args.shape, "batch": args.batch, "seq": args.seq, "forward": args.forward,
        "compute": args.compute, "remat": args.remat, "matmul_flops_per_second": ceiling,
    }  # fmt: skip
    for name, measured in times.items():
        step = statistics.median(measured)
        mfu = needed / step / ceiling
        result[name] = {"tokens_per_second": count / step, "step_seconds": step, "mfu": mfu}
        print(
            f"{name:>12}: {count / step:7.0f} tokens/s, {1e3 * step:.0f} ms a step "
            f"({1e3 * min(measured):.0f} to {1e3 * max(measured):.0f}), {mfu:.0%} of "
            f"{ceiling / 1e9:.0f} GFLOP/s"
        )
    if args.profile:
        ours.call("profile")
    facts = ours.call("facts")
    result |= {**result["ours"], **facts}
    print(
        f"        ours: compiled in {facts['compile_seconds']:.0f} s, "
        f"{facts['peak_memory_bytes'] / 1e6:.0f} MB"
    )
    if theirs:
        result["ratio"] = result["ours"]["tokens_per_second"]
        result["ratio"] /= result["transformers"]["tokens_per_second"]
        print(f"       ratio: {result['ratio']:.2f}")
    return result


def curve(args):
    points = []
    for seq in map(int, args.contexts.split(",")):
        side = Apart(Ours, argparse.Namespace(**{**vars(args), "seq": seq}), None)
        rng = np.random.default_rng(0)
        rows = rng.integers(0, SHAPES[args.shape]["vocab_size"], (args.batch, seq))
        side.call("prepare", rows, args.steps > 0)
        tokens, memory = args.batch * seq, side.call("facts")["peak_memory_bytes"]
        point = {"seq": seq, "peak_memory_bytes": memory}
        line = f"{memory / 1e6:.0f} MB, {memory / tokens / 1e3:.0f} KB a token"
        if args.steps:
            step = statistics.median(side.call("step_seconds") for _ in range(args.steps))
            point["step_seconds"] = step
            line = f"{1e6 * step / tokens:.0f} µs a token, {line}"
        device = side.call("facts")["device"]
        side.stop()
        points.append(point)
        print(f"{seq:>7} tokens a row: {line}")
    facts = {"device": device, "batch": args.batch, "shape": args.shape, "only": args.only}
    return {**facts, "curve": points}


def model_config(args):
    alone = dict(num_hidden_layers=1, layer_types=(MIXERS[args.only],)) if args.only else {}
    return config(args.shape, mtp_steps=0, **alone)


class Apart:
    """A side in a process of its own, where its methods are called."""

    def __init__(self, side, *args, profile=False):
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read at process start
        if profile:  # otherwise operations on a CPU are not traced
            os.environ["XLA_FLAGS"] = (
                os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_xprof_traceme=true"
            )
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=serve, args=(far_end, side, *args), daemon=True)
        self.process.start()
        far_end.close()  # so that a call fails if the process ends

    def call(self, method, *args):
        """Calls a method and returns its result."""
        self.pipe.send((method, args))
        return self.pipe.recv()

    def stop(self):
        """Ends the process."""
        self.process.terminate()
        self.process.join()


def serve(pipe, side, *args):
    side = side(*args)
    with contextlib.suppress(EOFError):  # the parent has ended
        while True:
            method, arguments = pipe.recv()
            pipe.send(getattr(side, method)(*arguments))


class Ours:
    """The step of `train.py`, or the model's forward pass."""

    def __init__(self, args, tensors):
        run = tiny.get_config()
        run.model = ConfigDict(dataclasses.asdict(model_config(args)))
        # Products of fewer rows are slow; logits of more rows take memory.
        loss_chunk = args.loss_chunk or max(128, 512 // args.batch)
        run.train.update(
            global_batch_size=args.batch,
            sequence_length=args.seq,
            remat=args.remat,
            loss_chunk=min(loss_chunk, args.seq),
            diagnostics=False,
        )
        run.data.num_shards = 1
        run.precision.compute = args.compute
        sizes = dict(axis.split("=") for axis in args.mesh.split(",") if axis)
        run.mesh.update({axis: int(size) for axis, size in sizes.items()})
        self.devices = jax.devices() if sizes else jax.devices()[:1]
        self.config, self.forward = RunConfig.from_dict(run.to_dict()), args.forward
        self.dtype = jnp.dtype(args.compute)
        self.model = new_model(self.config)
        self.measured = {"device": jax.devices()[0].device_kind}
        if tensors:
            load_tensors(self.model, tensors)

    def prepare(self, tokens, run=True):
        """Compiles and takes a step; returns its cross-entropy, None for a forward pass."""
        # As for any program that applies a model many times, its parameters are not to be sliced.
        graph, params = nnx.split(self.model.unstacked() if self.forward else self.model)
        del self.model
        mesh = make_mesh(self.config.mesh, self.devices)
        with jax.set_mesh(mesh):
            start = time.perf_counter()
            if self.forward:
                tokens = jnp.asarray(tokens, jnp.int32)
                forward = forward_program(lambda params, tokens: nnx.merge(graph, params)(tokens))
                compiled = forward(self.dtype).lower(params, tokens).compile()
                self.step = lambda: jax.block_until_ready(compiled(params, tokens))
            else:
                program = make_program(self.config, mesh)
                compiled = program.step.lower(program.state, program.batch).compile()
                batch = placed(complete_batch(jnp.asarray(tokens, jnp.int32)), program.batch)
                self.state = placed(
                    initial_state(params, program.optimizer, self.config), program.state
                )

                def step():
                    self.state, metrics = compiled(self.state, batch)
                    return jax.block_until_ready(metrics)

                self.step = step
            self.measured["compile_seconds"] = time.perf_counter() - start
        memory = compiled.memory_analysis()
        # XLA:CPU's peak leaves most memory out; elsewhere the sum counts buffers of loops twice.
        self.measured["peak_memory_bytes"] = memory.peak_memory_in_bytes
        if jax.default_backend() == "cpu":
            self.measured["peak_memory_bytes"] = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                + memory.temp_size_in_bytes
                - memory.alias_size_in_bytes
            )
        first = self.step() if run else None
        return None if self.forward or first is None else float(first["ce"])

    def step_seconds(self):
        """Seconds of one step."""
        return seconds(self.step)

    def facts(self):
        """The device, the compile time, and the memory that a step allocates."""
        return self.measured

    def ceiling(self):
        """Operations a second of one large product, measured in this process."""
        return product_ceiling(self.dtype, rounds=5)

    def profile(self):
        """Prints the times of one more step's operations, the longest first."""
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.step()
            traces = pathlib.Path(folder).glob("**/*.xplane.pb")
            data = jax.profiler.ProfileData.from_file(str(next(traces)))
        taken, calls = collections.Counter(), collections.Counter()
        for line in (line for plane in data.planes for line in plane.lines):
            # A GPU's kernels, or calls of a CPU's threads; loops and branches contain other events.
            if not line.name.startswith(("Stream", "tf_XLAEigen")):
                continue
            for event in line.events:
                if not event.name.startswith(("end: ", "ThunkExecutor", "while", "cond")):
                    taken[event.name] += event.duration_ns
                    calls[event.name] += 1
        print(f"{calls.total()} kernels, {taken.total() / 1e6:.1f} ms")
        for name, nanoseconds in taken.most_common(40):
            print(f"{nanoseconds / 1e6:10.2f} ms {calls[name]:6} x {name}")


class Theirs:
    """The step, or the forward pass, of transformers' model with PyTorch's AdamW."""

    def __init__(self, args):
        import torch

        self.torch, self.forward = torch, args.forward
        self.model = reference(args.shape).train().to(getattr(torch, args.compute))

    def tensors(self):
        """The weights by name."""
        return {k: p.detach().float().numpy() for k, p in self.model.state_dict().items()}

    def prepare(self, tokens):
        """Takes a step; returns its cross-entropy, None for a forward pass."""
        ids = self.torch.tensor(tokens)
        optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95))

        def forward():
            with self.torch.no_grad():
                return self.model(ids).logits

        def step():
            loss = self.model(ids, labels=ids).loss
            loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        self.step = forward if self.forward else step
        first = self.step()
        return None if self.forward else first.item()

    def step_seconds(self):
        """Seconds of one step."""
        return seconds(self.step)


def placed(arrays, like):
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), arrays, like)


if __name__ == "__main__":
    main()
