"""Runs suites by name, for `eval.py` and for training, and formats their results.

- `perplexity`: cross-entropy and bits per byte, by document length and position.
- `lm_eval`: tasks of lm-evaluation-harness.
- `long_context`: retrieval by length and depth.
- `speculation`: the share of the MTP module's drafts that are accepted.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from absl import logging

from qwen3next_jax.config import SUITES, EvaluationConfig, ModelConfig, require_known
from qwen3next_jax.data.corpus import Data
from qwen3next_jax.data.sources import Records
from qwen3next_jax.data.tokenizer import Tokenizer
from qwen3next_jax.evaluation.evaluator import Evaluator
from qwen3next_jax.evaluation.long_context import TASKS, check_questions, long_context
from qwen3next_jax.evaluation.perplexity import check_length, document_perplexity
from qwen3next_jax.evaluation.speculation import beginnings, check_drafting, speculation
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.parallel.processes import ShouldStop

_CHATTING = {"lm_eval", "long_context"}  # the suites that read `EvaluationConfig.chat`


def check_suites(names: Iterable[str], options: EvaluationConfig) -> None:
    """Checks the arguments of suites before anything is computed.

    Args:
      names: names of suites.
      options: the suites' options.

    Raises:
      ValueError: a suite or a task is unknown, lm_eval has no tasks, or a suite that generates text
        would run in several processes.
      ModuleNotFoundError: lm_eval is among the suites and lm-evaluation-harness is not installed.
    """
    names = tuple(names)
    require_known("suites", names, SUITES)
    require_known("tasks of long_context", options.long_context_tasks, tuple(TASKS))
    generating = [name for name in names if name != "perplexity"]
    if generating and jax.process_count() > 1:
        raise ValueError(
            f"{', '.join(generating)} generate text, which works in one process, and there are "
            f"{jax.process_count()}; evaluate the run's checkpoints by eval.py instead"
        )
    if "lm_eval" in names:
        if not options.tasks:
            raise ValueError("The suite lm_eval needs tasks; name some, or YAML files of your own")
        _harness().check_tasks(options.tasks, options.include_path)


def check_usable(
    names: Iterable[str],
    options: EvaluationConfig,
    config: ModelConfig,
    tokenizer: Tokenizer,
    domains: Mapping[str, Records],
    *,
    on_error: str = "raise",
) -> None:
    """Checks what suites need of a model, its tokenizer and texts, before its weights are loaded.

    This loads the tasks of lm_eval with their data.

    Args:
      names: names of suites.
      options: the suites' options.
      config: the model's config.
      tokenizer: the model's tokenizer.
      domains, on_error: as `run_suite` takes them.

    Raises:
      FileNotFoundError: a suite uses a chat template, and there is none.
      ValueError: an option does not fit the model, or no text can be used.
      Exception: whatever the harness raises if it cannot load a task.
    """
    names = tuple(names)
    if options.chat and _CHATTING & set(names):
        _ = tokenizer.chat_template  # raises if there is none
    if "perplexity" in names:
        check_length(config, options.length)
    if "lm_eval" in names:
        _harness().check_loadable(
            options.tasks,
            context=config.context_length,
            tokenizer=tokenizer,
            include_path=options.include_path,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
    if "speculation" in names:
        check_drafting(config)
        beginnings(domains, tokenizer, on_error=on_error)
    if "long_context" in names:
        check_questions(config, tokenizer, **_questions(options))


def _questions(options: EvaluationConfig) -> dict[str, Any]:
    """The options of `long_context` as its arguments."""
    return {
        "tasks": options.long_context_tasks,
        "lengths": options.lengths,
        "depths": options.depths,
        "samples": options.limit or 4,
        "chat": options.chat,
        "seed": options.seed,
    }


def run_suite(
    name: str,
    evaluator: Evaluator,
    options: EvaluationConfig,
    domains: Mapping[str, Records],
    *,
    on_error: str = "raise",
) -> dict[str, Any]:
    """Runs a suite.

    Args:
      name: one of `SUITES`.
      evaluator: the model.
      options: the suites' options.
      domains: texts for "perplexity" and "speculation", by name; other suites read none.
      on_error: "raise", or "skip" records of those texts that cannot be used.

    Returns:
      What `document_perplexity`, `harness.run_tasks`, `long_context` or `speculation` returns.

    Raises:
      ValueError: a name is unknown, or an option does not fit the model.
    """
    check_suites([name], options)
    limit = options.limit
    if name == "perplexity":
        return document_perplexity(
            evaluator, domains, length=options.length, limit=limit, on_error=on_error
        )
    if name == "speculation":
        return speculation(
            evaluator, domains, prompts=limit or 16, drafts=options.drafts, on_error=on_error
        )
    if name == "long_context":
        return long_context(evaluator, **_questions(options))
    assert name == "lm_eval", name
    return _harness().run_tasks(
        evaluator,
        options.tasks,
        include_path=options.include_path,
        num_fewshot=None if options.num_fewshot < 0 else options.num_fewshot,
        chat=options.chat,
        limit=limit,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        seed=options.seed,
    )


def suites_in_training(
    options: EvaluationConfig, data: Data, should_stop: ShouldStop = lambda: False
) -> Callable[[Qwen3Next], dict[str, Any]] | None:
    """A function that runs the suites of a training run on its model; None if there are none.

    Its result is a line for metrics.jsonl: `eval_SUITE_NAME` for each of a suite's `scalars`, and
    `eval_long_context_cells`, a list of {task, length, depth, score}. The texts are the held-out
    ones. It asks `should_stop` before each batch, and raises `Stopped` if so.
    """
    if not options.suites:
        return None

    def run(model: Qwen3Next) -> dict[str, Any]:
        evaluator = Evaluator(
            model, data.tokenizer, batch_size=options.batch_size, should_stop=should_stop
        )
        metrics: dict[str, Any] = {}
        for name in options.suites:
            result = run_suite(
                name, evaluator, options, data.held_out_parts, on_error=data.on_error
            )
            logging.info("%s:\n%s", name, table(name, result))
            metrics |= {f"eval_{name}_{key}": value for key, value in scalars(name, result).items()}
            if "cells" in result:
                metrics[f"eval_{name}_cells"] = [
                    {key: cell[key] for key in ("task", "length", "depth", "score")}
                    for cell in result["cells"]
                ]
        return metrics

    return run


def scalars(name: str, result: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among a suite's results, by name."""
    if name == "lm_eval":
        tasks = result["tasks"].items()
        return {
            f"{task}_{metric.replace(',', '_')}": value
            for task, metrics in tasks
            for metric, value in metrics.items()
        }
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
    if name == "speculation":
        places = enumerate(result["acceptance"], 1)
        numbers |= {f"acceptance_{place}": share for place, share in places}
    return numbers


def table(name: str, result: Mapping[str, Any]) -> str:
    """A suite's results as a table for the terminal."""
    tables = {
        "perplexity": _perplexity_table,
        "lm_eval": _lm_eval_table,
        "speculation": _speculation_table,
        "long_context": _long_context_table,
    }
    return _aligned(*tables[name](result))


def _perplexity_table(result):
    heads = ["", "documents", "tokens", "nats a token", "bits a byte"]
    rows = [["all", *_perplexity_row(result)]]
    rows += [[name, *_perplexity_row(part)] for name, part in result.get("domains", {}).items()]
    for key, what in (("by_length", "documents of"), ("by_position", "tokens behind")):
        rows += [
            [f"{what} {part['from']}–{part['to'] - 1}", *_perplexity_row(part)]
            for part in result[key]
        ]
    return heads, rows


def _perplexity_row(part: Mapping[str, Any]) -> list[str]:
    bits = part.get("bits_per_byte")
    return [
        f"{part['documents']:,}" if "documents" in part else "",
        f"{part['tokens']:,}",
        f"{part['ce']:.4f}",
        "" if bits is None else f"{bits:.4f}",
    ]


def _lm_eval_table(result):
    rows = []
    for task, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            base, comma, filtered = metric.partition(",")
            if base.endswith("_stderr"):
                continue
            error = metrics.get(f"{base}_stderr{comma}{filtered}")
            rows.append([task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"])
    return ["task", "metric", "value", "±"], rows


def _speculation_table(result):
    drafts = [f"draft {i + 1}" for i in range(len(result["acceptance"]))]
    parts = {"all": result, **(result["domains"] if len(result["domains"]) > 1 else {})}
    rows = [
        [
            name,
            *(f"{share:.1%}" for share in part["acceptance"]),
            f"{part['tokens_per_pass']:.2f}",
            f"{part['drafted']}",
        ]
        for name, part in parts.items()
    ]
    return ["", *drafts, "tokens a pass", "passes"], rows


def _long_context_table(result):
    cells = result["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    rows = []
    for task, depth in dict.fromkeys((cell["task"], cell["depth"]) for cell in cells):
        scores = {
            c["length"]: c["score"] for c in cells if (c["task"], c["depth"]) == (task, depth)
        }
        rows.append([task, f"{depth:.0%}", *(f"{scores[n]:.2f}" for n in lengths)])
    return ["task", "depth", *map(str, lengths)], rows


def _aligned(heads: list[str], rows: list[list[str]]) -> str:
    """A text table with the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(row):
        cells = (
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(heads), line(["-" * w for w in widths]), *map(line, rows)])


def _harness():
    # Imported only if used: it imports PyTorch and transformers, which takes seconds.
    from qwen3next_jax.evaluation import harness

    return harness
