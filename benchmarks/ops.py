"""Speed of each operation in each of its implementations, relative to the device's peaks.

    python benchmarks/ops.py                                   the small model's sizes, float32
    python benchmarks/ops.py --shape=80b --dtype=bfloat16 --batch=4 --tokens=4096   on a TPU or GPU
    python benchmarks/ops.py --ops=delta_rule,attention --json

Operations are counted from the mathematics, whatever an implementation executes, so that rates are
comparable: 8 H P a token and value head for the delta rule, half of all scores for causal
attention, and for forward and backward three times the forward pass. Bytes are those of inputs and
outputs, once. The peaks are measured in the same run: a square matrix product in the same dtype,
and a copy of an array too large for the caches. Medians over `--rounds`, in which the
implementations alternate. TPU kernels are not timed on a CPU, where they are interpreted. With
--json the last line is one JSON object.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from shapes import config

from qwen3next_jax import ops
from qwen3next_jax.ops.grouped_matmul import MOST_ROWS
from qwen3next_jax.ops.grouped_matmul import default_implementation as default_product


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="in a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)}")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.ops.split(",")) - set(OPS):
        parser.error(f"unknown operations {sorted(unknown)}; there are {', '.join(OPS)}")
    flops, bandwidth = ceilings(jnp.dtype(args.dtype), args.rounds)
    print(
        f"{jax.devices()[0].device_kind}: {flops / 1e9:,.0f} GFLOP/s, {bandwidth / 1e9:,.1f} GB/s"
    )
    print(f"{'':34}{'ms':>10}{'GFLOP/s':>10}{'of peak':>9}{'GB/s':>8}{'of peak':>9}")
    rows = [row for name in args.ops.split(",") for row in measure(name, args, flops, bandwidth)]
    if args.json:
        device = jax.devices()[0].device_kind
        peaks = {"flops_per_second": flops, "bytes_per_second": bandwidth}
        print(json.dumps({"device": device, **vars(args), "ceilings": peaks, "rows": rows}))


def measure(name, args, peak_flops, peak_bandwidth):
    implementations, flops, arrays, differentiable = OPS[name](args)
    arrays = [jnp.asarray(x) for x in arrays]

    def backward(function):
        def loss(*arrays):
            return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(function(*arrays)))

        return jax.value_and_grad(loss, argnums=range(differentiable))

    runs = {}
    for implementation, function in implementations.items():
        runs[implementation, "forward"] = jax.jit(function)
        runs[implementation, "forward+backward"] = jax.jit(backward(function))
    times = seconds({key: (run, arrays) for key, run in runs.items()}, args.rounds)
    for (implementation, direction), taken in times.items():
        whole = direction != "forward"
        outputs = jax.tree.leaves(jax.eval_shape(runs[implementation, direction], *arrays))
        moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs))
        row = {
            "op": name,
            "implementation": implementation,
            "direction": direction,
            "seconds": taken,
            "flops_per_second": (3 if whole else 1) * flops / taken,
            "bytes_per_second": moved / taken,
        }
        print(
            f"{name:>14} {implementation:>10} {'fwd+bwd' if whole else 'fwd':>8}{1e3 * taken:10.2f}"
            f"{row['flops_per_second'] / 1e9:10.1f}{row['flops_per_second'] / peak_flops:9.1%}"
            f"{row['bytes_per_second'] / 1e9:8.2f}{row['bytes_per_second'] / peak_bandwidth:9.1%}",
            flush=True,
        )
        yield row


def delta_rule(args):
    c, random = config(args.shape), normal(args)
    K, H = c.linear_num_key_heads, c.linear_key_head_dim
    N, P = c.linear_num_value_heads, c.linear_value_head_dim
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (random(K, H), random(K, H)))
    g = -np.exp(np.random.default_rng(1).uniform(-5, 1, (args.batch, args.tokens, N)))
    arrays = [*(x.astype(q.dtype) for x in (q * H**-0.5, k)), random(N, P), np.float32(g)]
    arrays.append(np.float32(np.random.default_rng(2).uniform(0, 1, g.shape)))

    def of(name):
        return lambda q, k, v, g, beta: ops.gated_delta_rule(
            q, k, v, log_decay=g, beta=beta, implementation=name
        )

    saved = 4 * args.batch * args.tokens * N * H * P  # bytes of states for the backward pass
    names = ["reference"] * (saved < 8e9) + ["chunked", *_kernels("hopper")]
    return {n: of(n) for n in names}, 8 * H * P * N * args.batch * args.tokens, arrays, 5


def attention(args):
    c, random = config(args.shape), normal(args)
    N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    arrays = [random(heads, H) for heads in (N, K, K)]
    names = ["reference", "chunked", *_kernels("cudnn")]

    def of(name):
        return lambda q, k, v: ops.attention(q, k, v, implementation=name)

    return {n: of(n) for n in names}, 2 * H * N * args.batch * args.tokens**2, arrays, 3


def grouped_matmul(args):
    """An expert's first product, for all rows of an even load."""
    c, random = config(args.shape), np.random.default_rng(0)
    E, D, F = c.num_experts, c.hidden_size, 2 * c.moe_intermediate_size
    each = -(-args.batch * args.tokens * c.num_experts_per_tok // E // MOST_ROWS) * MOST_ROWS
    dtype = jnp.dtype(args.dtype)
    arrays = [random.standard_normal(s).astype(dtype) for s in ((E * each, D), (E, D, F))]
    sizes = jnp.full(E, each, jnp.int32)

    def ours(x, w):
        return ops.grouped_matmul(x, w, sizes, block=MOST_ROWS)

    def by_jax(x, w):
        return jax.lax.ragged_dot(x, w, sizes)

    ours_name = default_product(D, F, dtype, MOST_ROWS)
    implementations = {ours_name: ours, "ragged_dot": by_jax}
    return implementations, 2 * E * each * D * F, arrays, 2


def causal_conv(args):
    c, random = config(args.shape), normal(args)
    N, P, W = c.linear_num_value_heads, c.linear_value_head_dim, c.linear_conv_kernel_dim
    kernel = np.random.default_rng(1).standard_normal((W, N, P)).astype(jnp.dtype(args.dtype))
    flops = 2 * W * N * P * args.batch * args.tokens

    def of(name):
        return lambda x, w: ops.causal_conv(x, w, activation="silu", implementation=name)

    return {n: of(n) for n in ["shifted", *_kernels()]}, flops, [random(N, P), kernel], 2


def cross_entropy(args):
    """Differentiated, the forward pass computes the gradients too; otherwise losses only."""
    c, random = config(args.shape), normal(args)
    D, V, rng = c.hidden_size, c.vocab_size, np.random.default_rng(1)
    head = rng.standard_normal((D, V), np.float32).astype(jnp.dtype(args.dtype))
    targets = rng.integers(0, V, (args.batch, args.tokens)).astype(np.int32)
    weights = np.ones(targets.shape, np.float32)

    def loss(hidden, head, targets, weights):
        return ops.cross_entropy(hidden, head, targets, weights)[0]

    flops = 2 * D * V * args.batch * args.tokens
    return {"chunked": loss}, flops, [random(D), head, targets, weights], 2


OPS = {f.__name__: f for f in (delta_rule, attention, grouped_matmul, causal_conv, cross_entropy)}


def _kernels(on_gpu=None):
    names = {"tpu": "pallas", "gpu": on_gpu}
    return [name for name in [names.get(jax.default_backend())] if name]


def normal(args):
    """A function that draws normal arrays [batch, tokens, ...] of the run's dtype."""
    rng, dtype = np.random.default_rng(0), jnp.dtype(args.dtype)
    return lambda *shape: rng.standard_normal((args.batch, args.tokens, *shape), np.float32).astype(
        dtype
    )


def ceilings(dtype, rounds):
    """Peak operations a second, of a matrix product, and bytes a second, of a copy."""
    array = jnp.ones(1 << (26 if jax.default_backend() == "cpu" else 29), jnp.float32)
    copy = seconds({"copy": (jax.jit(lambda x: x + 1), [array])}, rounds)["copy"]
    return product_ceiling(dtype, rounds), 2 * array.nbytes / copy


def product_ceiling(dtype, rounds):
    """Operations a second of a large square product of random numbers; ones would be faster."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return 2 * size**3 / seconds({0: (jax.jit(lambda x: x @ x), [matrix])}, rounds)[0]


def seconds(runs, rounds):
    """Median seconds of a call of each function with its arguments; the functions alternate."""
    taken = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, (function, arrays) in runs.items():
            start = time.monotonic()
            jax.block_until_ready(function(*arrays))
            if round_:  # the first one compiles
                taken[name].append(time.monotonic() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
