"""Size of a report, and the time to write it, for a run of 100,000 steps.

    python benchmarks/report.py [--steps=100000] [--log_every=1] [--layers=48] [--every=1000]

The metrics are random, as many as a run with --layers layers writes. The report is written every
--every steps, as training does at checkpoints, and once by a `Report` that reads all lines.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np

from qwen3next_jax.evaluation.report import Report

SCALARS, MAPS = 32, 14


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--log_every", type=int, default=1)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--every", type=int, default=1000, help="steps between reports")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, pathlib.Path(folder))
    for name, value in result.items():
        print(f"{name:24} {value:,.3f}")
    if args.json:
        print(json.dumps(result))


def measure(args, workdir):
    rng = np.random.default_rng(0)
    noise = [json.dumps(metrics(rng, args.layers))[1:] for _ in range(64)]
    report, seconds = Report([workdir], workdir / "report.html"), []
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(args.log_every, args.steps + 1, args.log_every):
            file.write(f'{{"step": {step}, {noise[rng.integers(64)]}\n')
            if step % args.every == 0:
                file.flush()
                start = time.perf_counter()
                report.write()
                seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    Report([workdir], workdir / "report.html").write()
    return {
        "metrics_megabytes": (workdir / "metrics.jsonl").stat().st_size / 1e6,
        "report_megabytes": (workdir / "report.html").stat().st_size / 1e6,
        "median_update_seconds": float(np.median(seconds)),
        "longest_update_seconds": max(seconds),
        "seconds_for_all_at_once": time.perf_counter() - start,
    }


def metrics(rng, layers):
    scalars = {f"metric_{i}": float(f"{x:.7g}") for i, x in enumerate(rng.random(SCALARS))}
    maps = {
        f"layers/metric_{i}": [float(f"{x:.5g}") for x in rng.random(layers)] for i in range(MAPS)
    }
    return scalars | maps


if __name__ == "__main__":
    main()
