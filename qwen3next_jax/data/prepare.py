r"""Tokenises a source once, into ArrayRecord shards with a manifest.

    python -m qwen3next_jax.data.prepare --source=jsonl --path='/corpus/*.jsonl.zst' \
        --tokenizer=FILE --output=DIR [--workers=N]

and then `data.source="prepared"`, `data.path=DIR` in a run's config. Each shard is made of a fixed
share of the records, so it is a function of source, tokenizer and its number alone: whichever
process or machine makes it, in whatever order, its bytes are the same. A finished shard is renamed
into place and gets a note beside it. The same command, run again, makes the shards without a note;
the last step gathers the notes in the manifest.

    ... --beam -- --runner=DataflowRunner --project=...

makes the shards in an Apache Beam pipeline instead (what follows `--` are its options); source,
tokenizer and output are then paths that all its workers can reach.
"""

import argparse
import dataclasses
import functools
import glob
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm
from absl import logging
from etils import epath

from qwen3next_jax.command import friendly_errors, write_atomic
from qwen3next_jax.data.documents import tokenized
from qwen3next_jax.data.files import TfdsSplit, import_extra, size_and_time
from qwen3next_jax.data.globs import fixed_folder, matching_files
from qwen3next_jax.data.prepared import (
    FORMAT,
    MANIFEST,
    chat_template_sha256,
    encode_document,
    encode_error,
    read_manifest,
    write_shard,
)
from qwen3next_jax.data.sources import (
    BadRecordError,
    Record,
    Source,
    add_source_arguments,
    open_source,
)
from qwen3next_jax.data.tokenizer import Tokenizer, fingerprint, keep_tokenizer, load_tokenizer

_PLAN = "plan.json"
_EXAMPLES = 5  # how many skipped records a shard's note names, and how many are logged at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A description of the data to prepare; small, because it is pickled to every worker.

    Attributes:
      source, path, field, split, on_error: see `open_source`.
      tokenizer, chat_template: see `load_tokenizer`.
      output: a directory.
      num_shards: number of shards; 0 derives it from the number of records.
    """

    source: str
    path: str = ""
    field: str = "text"
    split: str = "train"
    on_error: str = "raise"
    tokenizer: str
    chat_template: str = ""
    output: str
    num_shards: int = 0


def main(argv: list[str] | None = None) -> None:
    """Runs a command line."""
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m qwen3next_jax.data.prepare", description=(__doc__ or "").partition("\n")[0]
    )
    add_source_arguments(parser)
    parser.add_argument("--tokenizer", required=True, help="a file, or a directory that holds one")
    parser.add_argument("--chat_template", default="", help="a file; else the tokenizer's")
    parser.add_argument("--output", required=True, help="a directory")
    parser.add_argument(
        "--num_shards", type=int, default=0, help="else 16 to 1024, by the number of records"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes; as many as cores if not given",
    )
    parser.add_argument("--beam", action="store_true", help="in an Apache Beam pipeline")
    args = vars(parser.parse_args(argv[:at]))
    workers, beam, options = args.pop("workers"), args.pop("beam"), argv[at + 1 :]
    if options and not beam:
        parser.error(f"{options} are options of a pipeline; give --beam as well")
    if workers < 1:
        parser.error(f"--workers={workers} must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))
    run = (
        functools.partial(_in_a_pipeline, options=options)
        if beam
        else functools.partial(_in_processes, workers=workers)
    )
    start = time.monotonic()
    with friendly_errors():
        try:
            manifest = prepare(Job(**args), run)
        except BadRecordError as error:
            raise BadRecordError(
                f"{error}\nShards that are finished stay; with --on_error=skip the same command "
                "goes on from there, without such records."
            ) from error
    seconds = time.monotonic() - start
    examples = [example for shard in manifest["shards"] for example in shard["examples"]]
    for example in examples[:_EXAMPLES]:
        logging.warning("Skipped %s", example)
    print(
        f"{args['output']}: {manifest['records']:,} records, {manifest['skipped']:,} of them "
        f"skipped, {manifest['tokens']:,} tokens, in {len(manifest['shards'])} shards, after "
        f"{seconds:.1f} s"
    )


Run = Callable[[Job, Sequence[int], Callable[[int], None]], None]


def prepare(job: Job, run: Run) -> dict[str, Any]:
    """Makes all shards that are not there yet, then the manifest, which it returns.

    Args:
      job: what to prepare.
      run: given the job, the numbers of shards, and what to call with each that is done, calls
        `make_shard` for each.

    Raises:
      ValueError: the source, the tokenizer or a record is bad, or the directory holds data that
        were prepared otherwise; names what differs.
    """
    output = epath.Path(job.output)
    source, tokenizer = _open(job)
    job = dataclasses.replace(job, num_shards=job.num_shards or _suitable_shards(len(source)))
    if not 1 <= job.num_shards <= len(source):
        raise ValueError(
            f"--num_shards={job.num_shards} must lie between 1 and the number of records, "
            f"{len(source)}"
        )
    plan = _plan(job, source, tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    _check_plan(output, plan)
    if not (output / MANIFEST).exists():
        keep_tokenizer(tokenizer, output)
        _write_json(output / _PLAN, plan)
        shards = range(job.num_shards)
        todo = [k for k in shards if not _is_made(job, k)]
        if len(todo) < len(shards):
            logging.info(
                "Going on: %d of %d shards are there", len(shards) - len(todo), len(shards)
            )
        bar = tqdm.tqdm(total=len(source), unit=" records", disable=None)

        def done(k: int) -> None:
            bar.update(len(_records(job, len(source), k)))

        with bar:
            for k in set(shards) - set(todo):
                done(k)
            run(job, todo, done)
        notes = [json.loads(_note(job, k).read_text()) for k in shards]
        if sum(note["skipped"] for note in notes) == len(source):
            raise ValueError(
                f"All {len(source):,} records were skipped, the first since "
                f"{notes[0]['examples'][0]}; {output} has no manifest and can be removed"
            )
        _write_json(output / MANIFEST, _manifest(plan, source, notes))
    # The manifest now holds the notes, and partial files were left by processes that were killed.
    for pattern in (_PLAN, "shard-*.array_record.json", ".shard-*", f".{_PLAN}.*"):
        for file in list(output.glob(pattern)):
            file.unlink()
    return read_manifest(output)


def make_shard(job: Job, k: int) -> int:
    """Writes shard k, then its note; returns k."""
    source, tokenizer = _open(job)
    path = epath.Path(job.output) / _shard_name(job, k)
    counts: dict[str, Any] = {"tokens": 0, "learnt": 0, "skipped": 0, "chats": 0, "examples": []}
    digest = hashlib.sha256()

    def records() -> Iterator[bytes]:
        for i in _records(job, len(source), k):
            name = source.name(i)
            try:
                record = source[i]
                digest.update(_content(record))
                document = tokenized(record, tokenizer)
            except BadRecordError as error:
                if job.on_error != "skip":
                    raise
                reason = str(error).removeprefix(f"{name}: ")
                digest.update(json.dumps([name, None, reason]).encode())
                counts["skipped"] += 1
                counts["examples"] = [*counts["examples"], str(error)][:_EXAMPLES]
                yield encode_error(name, reason)
                continue
            counts["tokens"] += len(document["tokens"])
            counts["learnt"] += int((document["loss_weights"] > 0).sum())
            counts["chats"] += record.messages is not None
            yield encode_document(name, document)

    size, sha256 = write_shard(path, records())
    note = {"file": path.name, "records": len(_records(job, len(source), k)), **counts,
            "bytes": size, "sha256": sha256, "source_sha256": digest.hexdigest()}  # fmt: skip
    _write_json(_note(job, k), note)
    return k


def _in_processes(
    job: Job, shards: Sequence[int], done: Callable[[int], None], *, workers: int
) -> None:
    with ProcessPoolExecutor(
        min(workers, max(len(shards), 1)), multiprocessing.get_context("spawn"), _begin_worker
    ) as pool:
        futures = [pool.submit(make_shard, job, k) for k in shards]
        try:
            for future in as_completed(futures):
                done(future.result())
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker process was killed, perhaps for lack of memory: take fewer --workers"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)  # running ones finish
            raise


def _begin_worker() -> None:
    """Leaves interrupts to the parent process, and exits when the parent dies for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_a_pipeline(
    job: Job, shards: Sequence[int], done: Callable[[int], None], *, options: Sequence[str]
) -> None:
    beam = import_extra("apache_beam", extra="beam")
    pipeline_options = import_extra("apache_beam.options.pipeline_options", extra="beam")
    with beam.Pipeline(options=pipeline_options.PipelineOptions(list(options))) as pipeline:
        _ = (
            pipeline
            | "Shards" >> beam.Create(list(shards))
            | "Spread" >> beam.Reshuffle()
            | "Make" >> beam.Map(functools.partial(make_shard, job))
        )
    for k in shards:
        done(k)


@functools.lru_cache(maxsize=1)
def _open(job: Job) -> tuple[Source, Tokenizer]:
    """Opens source and tokenizer, once in each process."""
    source = open_source(
        job.source, job.path, field=job.field, split=job.split, on_error=job.on_error
    )
    return source, load_tokenizer(job.tokenizer, chat_template=job.chat_template)


def _suitable_shards(records: int) -> int:
    return min(records, max(16, min(1024, -(-records // 4096))))


def _records(job: Job, records: int, k: int) -> range:
    """The numbers of the records in shard k."""
    return range(k * records // job.num_shards, (k + 1) * records // job.num_shards)


def _shard_name(job: Job, k: int) -> str:
    return f"shard-{k:05}-of-{job.num_shards:05}.array_record"


def _note(job: Job, k: int) -> epath.Path:
    return epath.Path(job.output) / f"{_shard_name(job, k)}.json"


def _is_made(job: Job, k: int) -> bool:
    """Whether a shard has the size in its note; a power cut may lose data after a rename."""
    shard = epath.Path(job.output) / _shard_name(job, k)
    if not (_note(job, k).exists() and shard.exists()):
        return False
    try:
        return json.loads(_note(job, k).read_text())["bytes"] == size_and_time(shard)[0]
    except ValueError:  # an empty note
        return False


def _content(record: Record) -> bytes:
    """A record's content as bytes, for a hash."""
    content = (
        record.text
        if record.messages is None
        else [record.messages, record.tools, record.chat_template_kwargs]
    )
    return json.dumps([record.name, content], sort_keys=True, default=str).encode()


def _plan(job: Job, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the shards depend on except the records' contents."""
    return {
        "format": FORMAT,
        "source": {
            "source": job.source,
            "path": job.path,
            "field": job.field,
            "split": job.split,
            "records": len(source),
            "files_sha256": _files_sha256(job, source),
        },
        "on_error": job.on_error,
        "num_shards": job.num_shards,
        "tokenizer": {
            **fingerprint(tokenizer),
            "chat_template_sha256": chat_template_sha256(tokenizer),
        },
    }


def _files_sha256(job: Job, source: Source) -> str:
    """A hash of the files' names, sizes and mtimes, cheaper than one of their contents."""
    found: list[Any] = [sys.version] if job.source == "stdlib" else []
    pattern = job.path  # "" for sources without files
    if isinstance(dataset := source.files[0], TfdsSplit):
        pattern = os.path.join(glob.escape(dataset.folder), "*")
    if pattern:
        root = fixed_folder(pattern)
        for file in matching_files(pattern, []):
            size, changed = size_and_time(file)
            found.append([file.relative_to(root).as_posix(), size, int(changed)])
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def _check_plan(output: epath.Path, plan: dict[str, Any]) -> None:
    for name in (_PLAN, MANIFEST):
        if not (output / name).exists():
            continue
        try:
            before = json.loads((output / name).read_text())
        except ValueError as error:
            raise ValueError(
                f"{output / name} cannot be read ({error}), so what is there cannot be trusted; "
                f"remove {output} and begin anew"
            ) from error
        if name == _PLAN and (before.get("on_error"), plan["on_error"]) == ("raise", "skip"):
            before["on_error"] = "skip"  # the finished shards have no bad record
        differing = [
            f"{key}: was {before.get(key)!r}, now {now!r}"
            for key, now in plan.items()
            if before.get(key) != now
        ]
        if differing:
            raise ValueError(
                f"{output} holds data that were prepared otherwise; restore these, or choose "
                "another --output:\n  " + "\n  ".join(differing)
            )


def _manifest(
    plan: dict[str, Any], source: Source, notes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    counted = ("records", "tokens", "learnt", "skipped", "chats")
    return {
        **plan,
        **{key: sum(note[key] for note in notes) for key in counted},
        "skipped_files": list(source.skipped_files),
        "files": [[file.name, len(file), file.is_one_document] for file in source.files],
        "shards": list(notes),
    }


def _write_json(path: epath.Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    # Pickled functions must carry the module's importable name, not "__main__".
    from qwen3next_jax.data import prepare as module

    module.main()
