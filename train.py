"""Trains a Qwen3-Next model.

    python train.py                                   a tiny one, on Python's own source
    python train.py --config=configs/80b_a3b.py --workdir=DIR
    python train.py --config.train.num_steps=1200     any value of the config can be given

Run again with the same --workdir, it resumes from the last checkpoint. SIGTERM, and in one process
Ctrl-C, finishes and saves the current step and exits. `docs/launch.md` describes runs on many
machines.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import config_flags

from qwen3next_jax.command import (
    enable_compilation_cache,
    explain_unknown_key,
    friendly_errors,
    use_huge_pages,
)
from qwen3next_jax.config import RunConfig

if TYPE_CHECKING:
    from qwen3next_jax.parallel.processes import ShouldStop

_ROOT = os.path.dirname(os.path.abspath(__file__))

# absl looks up the keys of the default config here, those of another config in app.run.
with explain_unknown_key():
    _CONFIG = config_flags.DEFINE_config_file("config", os.path.join(_ROOT, "configs", "tiny.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/CONFIG when not given.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Of several processes: HOST:PORT of process 0."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout", 100.0, "Seconds after which a silent process counts as missing.", 1.0
)
_STOPPED = flags.DEFINE_integer("stopped_exit_code", 0, "The exit code after SIGTERM.", 0, 255)


def main(argv: list[str]) -> None:
    """Trains, evaluates, and prints a sample."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}; values are given as --config.KEY=V")
    with friendly_errors():
        config = RunConfig.from_dict(_CONFIG.value.to_dict())
        # JAX is imported after the flags, so that --help and mistakes in them answer at once.
        from qwen3next_jax.parallel.processes import joined

        enable_compilation_cache()
        with joined(
            coordinator_address=_COORDINATOR.value,
            num_processes=_NUM_PROCESSES.value,
            process_id=_PROCESS_ID.value,
            peer_timeout=_PEER_TIMEOUT.value,
        ) as should_stop:
            stopped = run(config, should_stop)
    if stopped:
        sys.exit(_STOPPED.value)


def run(config: RunConfig, should_stop: "ShouldStop") -> bool:
    """Locks the work directory and trains; returns whether it was stopped before the end."""
    from qwen3next_jax.evaluation.suites import check_suites
    from qwen3next_jax.training.workdir import workdir_lock

    check_suites(config.evaluation.suites, config.evaluation)
    # After a colon follows the config's argument.
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    name = os.path.splitext(os.path.basename(file))[0]
    if "://" in (_WORKDIR.value or ""):
        raise ValueError(
            f"--workdir={_WORKDIR.value} is no path of a mounted file system; mount the bucket and "
            "give the path there"
        )
    workdir = pathlib.Path(_WORKDIR.value or os.path.join("runs", name))
    with workdir_lock(workdir):
        return run_in(workdir, config, should_stop)


def run_in(workdir: pathlib.Path, config: RunConfig, should_stop: "ShouldStop") -> bool:
    """Trains, evaluates, and prints a sample; returns whether it was stopped before the end."""
    import jax

    from qwen3next_jax.data.corpus import load_data
    from qwen3next_jax.data.tokenizer import keep_tokenizer
    from qwen3next_jax.evaluation.perplexity import perplexity_in_training
    from qwen3next_jax.evaluation.report import Report
    from qwen3next_jax.evaluation.samples import samples_in_training
    from qwen3next_jax.evaluation.suites import check_usable, suites_in_training
    from qwen3next_jax.parallel.processes import process_0_first
    from qwen3next_jax.training.loop import Stopped, train
    from qwen3next_jax.training.workdir import discard_unstarted_run, has_steps

    with process_0_first():  # it may train the tokenizer
        discard_unstarted_run(config, workdir)
        data = load_data(
            **dataclasses.asdict(config.data),
            vocab_size=config.model.vocab_size,
            trained_tokenizer=workdir / "tokenizer.model",
            given_weights="" if has_steps(workdir) else config.train.initial_checkpoint,
        )
        keep_tokenizer(data.tokenizer, workdir, ends=data.ends())
    check_usable(
        config.evaluation.suites,
        config.evaluation,
        config.model,
        data.tokenizer,
        data.held_out_parts,
        on_error=data.on_error,
    )
    logging.info(
        "%d records to train on, %d held out (%s bytes)",
        sum(len(part.records) for part in data.train),
        len(data.held_out),
        f"{data.held_out_bytes:,}",
    )

    sample = samples_in_training(config.train, config.model, data.tokenizer)
    page = Report([workdir], workdir / "report.html")

    def report():
        try:
            page.write()
        except Exception:
            logging.exception("The report could not be written; the run goes on without")

    try:
        _, steps = train(
            config,
            workdir,
            data,
            evaluate=perplexity_in_training(config.train, data, should_stop),
            sample=sample,
            suites=suites_in_training(config.evaluation, data, should_stop),
            report=report,
            should_stop=should_stop,
        )
    except Stopped as stop:
        logging.info("Stopped: %s. The same command goes on from there.", stop)
        return True
    first = jax.process_index() == 0
    if steps == 0 and first:
        print(
            f"The run in {workdir} is finished: {config.train.num_steps} steps. For more, give "
            "--config.train.num_steps=N; for another run, another --workdir."
        )
    if steps and sample and first:
        *_, last = (workdir / "samples.jsonl").read_text().splitlines()
        written = json.loads(last)
        print(f"\nWhat the model writes by itself:\n\n{written['prompt']}{written['text']}")
    return False


if __name__ == "__main__":
    use_huge_pages()
    app.run(main, flags_parser=explain_unknown_key()(app.parse_flags_with_usage))
