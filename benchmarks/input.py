"""Memory of reading many batches, and how full their rows are.

    python benchmarks/input.py --batches=100000      resident memory as batches are read
    python benchmarks/input.py --packing             packers against the fewest rows possible

Batches are of the synthetic source with bytes as tokens: a tokenizer's cache would grow up to its
bound, and hide other growth. Packers are tested on documents of log-normal length, median 400 and
mean about 900 tokens, cut at the length of a row, like web pages and chats. The fewest rows
possible are the tokens over a row's length, rounded up.
"""

import argparse
import json
import time

import grain
import numpy as np
import psutil

from qwen3next_jax.data.corpus import Data, TrainingPart
from qwen3next_jax.data.packing import best_fit, concatenate
from qwen3next_jax.data.pipeline import input_metrics, training_batches
from qwen3next_jax.data.sources import open_source


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, default=64, help="tokens in a row")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = packing() if args.packing else memory(args)
    if args.json:
        print(json.dumps(result))


class Bytes:
    """The part of a tokenizer's interface that documents need."""

    bos_id, eos_id, vocab_size = 256, 257, 258

    def encode(self, text):
        """The ids of a text."""
        return list(text.encode())


def memory(args):
    part = TrainingPart("synthetic", open_source("synthetic", ""))
    data = Data(train=[part], held_out=[], tokenizer=Bytes(), num_shards=2)
    batches = training_batches(data, batch_size=args.batch, sequence_length=args.seq, seed=0)
    process, curve, start = psutil.Process(), [], time.monotonic()
    print(f"{'batches':>9} {'MB':>8} {'batches/s':>10}")
    for n in range(1, args.batches + 1):
        next(batches)
        if n % (args.batches // args.points) == 0:
            megabytes = process.memory_info().rss / 1e6
            curve.append((n, megabytes))
            print(f"{n:9,} {megabytes:8.1f} {n / (time.monotonic() - start):10.0f}", flush=True)
    metrics = input_metrics(data, batches.get_state(), sequence_length=args.seq)
    print({name: value for name, value in metrics.items() if value})
    batches.close()
    return {"curve": curve}


def packing():
    rng = np.random.default_rng(0)
    results = []
    print(f"{'T':>6} {'packer':<28} {'rows':>6} {'fewest':>6} {'filled':>7}")
    for size in (2048, 4096, 8192):
        lengths = rng.lognormal(np.log(400), 1.27, 20_000).clip(8, size).astype(int).tolist()
        windows = list(windows_of(lengths, 128 * size))
        lengths = [length for window in windows for length in window]
        fewest = -(-sum(lengths) // size)
        for name, rows in (
            ("best_fit, windows of 128", sum(len(best_fit(w, size)) for w in windows)),
            ("concatenate", len(concatenate(lengths, size))),  # it ignores windows
            ("Grain's best-fit, 128 bins", rows_of_grain(lengths, size)),
        ):
            share = sum(lengths) / (rows * size)
            print(f"{size:6} {name:<28} {rows:6} {fewest:6} {share:7.2%}")
            results.append({"T": size, "packer": name, "rows": rows, "fewest": fewest})
    return {"packing": results}


def windows_of(lengths, tokens):
    window, total = [], 0
    for length in lengths:
        window.append(length)
        total += length
        if total >= tokens:
            yield window
            window, total = [], 0


def rows_of_grain(lengths, size):
    documents = grain.MapDataset.source(
        [{"tokens": np.ones(length, np.int32)} for length in lengths]
    )
    packed = grain.experimental.BestFitPackIterDataset(
        documents.to_iter_dataset(), length_struct={"tokens": size}, num_packing_bins=128
    )
    return sum(1 for _ in packed)


if __name__ == "__main__":
    main()
