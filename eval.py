r"""Evaluates a model: a run's, or one of a Hugging Face directory.

    python eval.py --workdir=runs/tiny --suite=perplexity
    python eval.py --checkpoint=Qwen3-Next-80B-A3B-Instruct --mesh_fsdp=-1 --suite=lm_eval \
        --tasks=arc_easy
    python eval.py --workdir=runs/tiny --suite=long_context --output=FILE.json

A table goes to stdout, and everything as JSON to --output; see `docs/evaluation.md`.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from qwen3next_jax.command import (
    check_writable,
    enable_compilation_cache,
    friendly_errors,
    use_huge_pages,
    write_atomic,
)
from qwen3next_jax.config import SOURCES, SUITES, EvaluationConfig, read_json

if TYPE_CHECKING:
    from qwen3next_jax.checkpoint.load import OurCheckpoint
    from qwen3next_jax.data.sources import Records
    from qwen3next_jax.data.tokenizer import Tokenizer

_SUITE = flags.DEFINE_string("suite", None, f"One of {', '.join(SUITES)}.")
_WORKDIR = flags.DEFINE_string("workdir", None, "A run, whose newest checkpoint is evaluated.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A Hugging Face directory, a work directory, or one of its step folders."
)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the results.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "File or directory; else the checkpoint's.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Else as stored.")
_MESH_FSDP = flags.DEFINE_integer(
    "mesh_fsdp",
    None,
    "Split the model and rows over all devices: -1, or their number.",
    lower_bound=-1,
)
_DATA = flags.DEFINE_multi_string(
    "data",
    [],
    "Texts for perplexity and speculation, as SOURCE, SOURCE:PATH or SOURCE:PATH#FIELD (see "
    "docs/data.md); all of their records. May be given several times. Else what the run held out.",
)
_SPLIT = flags.DEFINE_string("split", "train", "Of --data from TensorFlow Datasets.")
_TASKS = flags.DEFINE_list("tasks", [], "Of lm_eval: names or YAML files; of long_context: names.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Rows at a time; 0: 8192 tokens a device.", lower_bound=0
)
_LIMIT = flags.DEFINE_integer(
    "limit",
    0,
    "Documents of perplexity and of each task of lm_eval; prompts of each --data of speculation; "
    "questions of each cell of long_context. 0: all, all, 16, 4.",
    lower_bound=0,
)
_SEED = flags.DEFINE_integer(
    "seed", 1234, "lm_eval, long_context: of what is drawn.", lower_bound=0
)
_LENGTH = flags.DEFINE_integer(
    "length", 0, "perplexity: tokens of a document read at once; 0: the context.", lower_bound=0
)
_INCLUDE_PATH = flags.DEFINE_string(
    "include_path", "", "lm_eval: a directory with YAML files of tasks."
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", -1, "lm_eval: examples before a question; -1: as the task says.", lower_bound=-1
)
_UNSAFE = flags.DEFINE_bool(
    "confirm_run_unsafe_code", False, "lm_eval: run code that the model writes, where a task does."
)
_LENGTHS = flags.DEFINE_list(
    "lengths", [], "long_context: in tokens; else powers of two up to the model's context."
)
_DEPTHS = flags.DEFINE_integer("depths", 5, "long_context: how many.", lower_bound=1)
_CHAT = flags.DEFINE_bool("chat", False, "lm_eval, long_context: ask through the chat template.")
_DRAFTS = flags.DEFINE_integer("drafts", 2, "speculation: tokens drafted at a time.", lower_bound=1)

# The suites that read a flag; a flag that is not listed is read by all suites.
_READ_BY = {
    "data": ("perplexity", "speculation"),
    "split": ("perplexity", "speculation"),
    "tasks": ("lm_eval", "long_context"),
    "length": ("perplexity",),
    "include_path": ("lm_eval",),
    "num_fewshot": ("lm_eval",),
    "confirm_run_unsafe_code": ("lm_eval",),
    "lengths": ("long_context",),
    "depths": ("long_context",),
    "chat": ("lm_eval", "long_context"),
    "drafts": ("speculation",),
    "seed": ("lm_eval", "long_context"),
}


def main(argv: list[str]) -> None:
    """Loads the checkpoint and runs one suite."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}; several tasks are --tasks=a,b")
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise app.UsageError("Which model? Give either --workdir=DIR or --checkpoint=DIR")
    if not _SUITE.value:
        raise app.UsageError(f"Give --suite, one of {', '.join(SUITES)}")
    enable_compilation_cache()
    with friendly_errors():
        _evaluate(_SUITE.value)


def _evaluate(suite: str) -> None:
    # JAX is imported after the flags, so that --help and mistakes in them answer at once.
    from qwen3next_jax.checkpoint.load import as_trained, load_checkpoint, open_checkpoint
    from qwen3next_jax.evaluation.evaluator import Evaluator
    from qwen3next_jax.evaluation.suites import check_suites, check_usable, run_suite, table
    from qwen3next_jax.parallel.mesh import fsdp_mesh
    from qwen3next_jax.training.environment import versions

    # Everything that can be checked quickly is checked before the model is loaded.
    options = _options()
    check_suites([suite], options)
    for name, suites in _READ_BY.items():
        if flags.FLAGS[name].present and suite not in suites:
            raise ValueError(
                f"--{name} has no effect on --suite={suite}; it is for {' and '.join(suites)}"
            )
    path = pathlib.Path(_WORKDIR.value or _CHECKPOINT.value or "")
    ours, config, tokenizer = open_checkpoint(path, _TOKENIZER.value)
    mesh = fsdp_mesh(_MESH_FSDP.value)
    run = {} if ours is None else read_json(ours.workdir / "config.json")
    domains: Mapping[str, Records] = {}
    if suite in _READ_BY["data"]:
        domains = _domains(run, ours, config.vocab_size, tokenizer)
    on_error = "raise" if _DATA.value else run.get("data", {}).get("on_error", "raise")
    check_usable([suite], options, config, tokenizer, domains, on_error=on_error)
    output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
    if output:
        check_writable(output)
    model = load_checkpoint(path, dtype=_DTYPE.value, mesh=mesh)

    start = time.monotonic()
    with as_trained(ours):
        results = run_suite(
            suite,
            Evaluator(model, tokenizer, batch_size=options.batch_size),
            options,
            domains,
            on_error=on_error,
        )
    if output:
        packages = ("qwen3next_jax", "jax", "jaxlib", "flax", "numpy", "lm_eval", "datasets")
        report = {
            "suite": suite,
            "checkpoint": str(path.absolute()),
            "config": {
                "model": model.config.to_dict(),
                "evaluation": dataclasses.asdict(options),
                "data": _DATA.value,
                "dtype": str(model.dtype),
                "mesh": {} if mesh is None else dict(mesh.shape),
            },
            "versions": versions(packages),
            "seeds": {"seed": options.seed},
            "seconds": time.monotonic() - start,
            "results": results,
            **({"cells": results["cells"]} if "cells" in results else {}),
        }
        text = json.dumps(report, indent=1, default=str) + "\n"
        write_atomic(output, text)
    print(table(suite, results))


def _options() -> EvaluationConfig:
    try:
        lengths = tuple(int(n) for n in _LENGTHS.value)
    except ValueError:
        raise app.UsageError(f"--lengths={_LENGTHS.value} must be whole numbers") from None
    tasks, asks_long = tuple(_TASKS.value), _SUITE.value == "long_context"
    return EvaluationConfig(
        batch_size=_BATCH_SIZE.value,
        limit=_LIMIT.value,
        seed=_SEED.value,
        length=_LENGTH.value,
        tasks=() if asks_long else tasks,
        include_path=_INCLUDE_PATH.value,
        num_fewshot=_NUM_FEWSHOT.value,
        confirm_run_unsafe_code=_UNSAFE.value,
        long_context_tasks=tasks if asks_long else (),
        lengths=lengths,
        depths=_DEPTHS.value,
        chat=_CHAT.value,
        drafts=_DRAFTS.value,
    )


def _domains(
    run: dict[str, Any], ours: "OurCheckpoint | None", vocab_size: int, tokenizer: "Tokenizer"
) -> "Mapping[str, Records]":
    """The texts that --data names, or else the held-out texts of the run in the work directory."""
    from qwen3next_jax.checkpoint.load import from_step
    from qwen3next_jax.data.corpus import changed_records, load_data
    from qwen3next_jax.data.prepared import check_prepared
    from qwen3next_jax.data.sources import open_source

    domains: dict[str, Any] = {}
    for text in _DATA.value:
        source, _, rest = text.partition(":")
        if source not in SOURCES:
            raise ValueError(
                f"--data={text} names no source; give SOURCE:PATH, such as jsonl:/corpus/*.jsonl, "
                f"where SOURCE is one of {', '.join(SOURCES)}"
            )
        path, named, field = rest.partition("#")
        field = field if named else "text"  # empty if the records are texts themselves
        domains[text] = open_source(source, path, field=field, split=_SPLIT.value)
        if source == "prepared":
            check_prepared(path, tokenizer)
    if domains:
        return domains
    if ours is None or "data" not in run:
        raise ValueError(
            "Which text? Give --data=SOURCE:PATH, such as jsonl:/corpus/*.jsonl, or --data=stdlib"
        )
    # The run's own copy of its tokenizer, wherever that came from.
    kept = {**run["data"], "tokenizer": _TOKENIZER.value or str(ours.workdir), "chat_template": ""}
    trained = ours.workdir / "tokenizer.model"
    data = load_data(**kept, vocab_size=vocab_size, trained_tokenizer=trained)
    began_with = from_step(ours, lambda store, step: store.describe(step)[1])
    for name in changed_records(data, began_with):
        logging.warning(
            "The records of %r are not those that the run began with: it may have been trained on "
            "some of what is held out now",
            name,
        )
    return data.held_out_parts


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
