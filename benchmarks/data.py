"""Speed of tokenisation in preparing data, and of reading batches.

    python benchmarks/data.py --repeat=8 --workers=1,2

The command `data.prepare` prepares Python's standard library, --repeat times as JSON lines, timed
with its start and manifest. The bare tokenizer on the same texts, in one thread of one process, is
timed before and after, to show whether the machine's speed has changed. `busy` is the share of the
time after the first shard in which the workers ran or waited for a core, according to Linux; tokens
per second of processor time compare the work itself. Both are valid on a busy machine as well. Then
batches of the tiny config are read from the prepared data and from the JSON lines. With --json the
last line is one JSON object.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from qwen3next_jax.data.corpus import load_data
from qwen3next_jax.data.pipeline import training_batches
from qwen3next_jax.data.sources import open_source
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.data.train_tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=8, help="of the corpus")
    parser.add_argument("--workers", default=f"1,{os.cpu_count()}", help="separated by commas")
    parser.add_argument("--tokenizer", help="a file; else SentencePiece is trained, of 2048 tokens")
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    library = open_source("stdlib", "")
    texts = [library[i].text for i in range(len(library))]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, texts, pathlib.Path(folder))
    if args.json:
        print(json.dumps(result))


def measure(args, texts, folder):
    if args.tokenizer is None:
        args.tokenizer = folder / "tokenizer.model"
        train_tokenizer(texts, args.tokenizer, vocab_size=2048)
    tokenizer = load_tokenizer(args.tokenizer)
    corpus = folder / "corpus.jsonl"
    with corpus.open("w") as file:
        for _ in range(args.repeat):
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    size = corpus.stat().st_size
    print(f"{len(texts) * args.repeat:,} documents, {size / 1e6:.0f} MB, {args.tokenizer}")

    result = {"bare": [bare_speed(tokenizer, texts)]}
    for workers in map(int, args.workers.split(",")):
        output = folder / str(workers)
        tokens, seconds, cpu, busy = prepare(corpus, args.tokenizer, output, workers)
        result[f"prepare_{workers}"] = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_cpu_second": tokens / cpu,
            "busy": busy,
        }
        print(
            f"prepare --workers={workers}: {tokens / seconds:,.0f} tokens/s ({tokens:,} in "
            f"{seconds:.1f} s), {busy:.0%} busy, {tokens / cpu:,.0f} a second of processor time"
        )
    result["bare"].append(bare_speed(tokenizer, texts))

    for source, path in (("prepared", folder / str(workers)), ("jsonl", corpus)):
        result[f"read_{source}"] = reading_speed(source, path, args, tokenizer.vocab_size)
    return result


def bare_speed(tokenizer, texts):
    start, cpu = time.monotonic(), time.process_time()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    print(
        f"bare tokenizer, one thread: {tokens / seconds:,.0f} tokens/s, "
        f"{tokens / cpu:,.0f} a second of processor time"
    )
    return {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu}


def prepare(corpus, tokenizer, output, workers):
    command = [sys.executable, "-m", "qwen3next_jax.data.prepare", "--source=jsonl",
               f"--path={corpus}", f"--tokenizer={tokenizer}", f"--output={output}",
               f"--workers={workers}"]  # fmt: skip
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    first, last = {}, {}
    while process.poll() is None:
        if list(output.glob("shard-*.json")):
            for worker, account in workers_of(process.pid).items():
                first.setdefault(worker, account)
                last[worker] = account
        time.sleep(0.1)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    busy = [(last[w][1] - first[w][1]) / (last[w][0] - first[w][0]) for w in first]
    manifest = json.loads((output / "manifest.json").read_text())
    return manifest["tokens"], seconds, cpu, sum(busy) / len(busy)


def workers_of(pid):
    """For each worker process, the time, and how long it has run or waited for a core."""
    accounts = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent != pid or "spawn_main" not in (path.parent / "cmdline").read_text():
                continue
            threads = (path.parent / "task").glob("*/schedstat")
            nanoseconds = sum(int(x) for file in threads for x in file.read_text().split()[:2])
            accounts[int(path.parent.name)] = (time.monotonic(), nanoseconds / 1e9)
        except OSError:
            continue  # the process has ended
    return accounts


def reading_speed(source, path, args, vocab_size):
    data = load_data(
        source=source,
        path=str(path),
        tokenizer=str(args.tokenizer),
        holdout_fraction=0.05,
        num_shards=4,
        window_rows=128,
        vocab_size=vocab_size,
        trained_tokenizer="none",
    )
    rows = training_batches(data, batch_size=8, sequence_length=512, seed=0)
    next(rows)
    start = time.monotonic()
    tokens = sum(int(next(rows)["loss_weights"].sum()) for _ in range(args.batches))
    speed = tokens / (time.monotonic() - start)
    print(f"batches of 8 × 512 from {source}: {speed:,.0f} tokens/s")
    return speed


if __name__ == "__main__":
    main()
