"""Trains a Qwen3-Next model.

    python train.py                                   a tiny one, on Python's own source
    python train.py --config=configs/80b_a3b.py --workdir=DIR
    python train.py --config.train.num_steps=1200     any value of the config can be given

Run again with the same --workdir, it goes on from the last checkpoint.
"""

import dataclasses
import os
import pathlib
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

_ROOT = os.path.dirname(os.path.abspath(__file__))
_CONFIG = config_flags.DEFINE_config_file("config", os.path.join(_ROOT, "configs", "tiny.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/CONFIG when not given.")


def main(argv: list[str]) -> None:
    """Trains, evaluates, and prints a sample."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}; values are given as --config.KEY=V")
    # Heavy imports come after the flags, so that --help and mistyped flags answer at once.
    from qwen3next_jax.config import RunConfig
    from qwen3next_jax.data.pipeline import evaluation_batches, load_data
    from qwen3next_jax.evaluation.perplexity import perplexity
    from qwen3next_jax.inference.decode import generate
    from qwen3next_jax.training.loop import train

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = os.path.join(os.path.expanduser("~"), ".cache", "qwen3next_jax", "compiled")
        jax.config.update("jax_compilation_cache_dir", cache)

    config = RunConfig.from_dict(_CONFIG.value.to_dict())
    name = os.path.splitext(
        os.path.basename(config_flags.get_config_filename(flags.FLAGS["config"]))
    )[0]
    workdir = pathlib.Path(_WORKDIR.value or os.path.join("runs", name))
    workdir.mkdir(parents=True, exist_ok=True)
    data = load_data(
        **dataclasses.asdict(config.data),
        vocab_size=config.model.vocab_size,
        trained_tokenizer=workdir / "tokenizer.model",
    )
    logging.info(
        "%d documents to train on, %d held out (%s bytes)",
        len(data.train), len(data.held_out), f"{data.held_out_bytes:,}",
    )  # fmt: skip

    def evaluate(graph, params):
        batches = evaluation_batches(
            data.held_out,
            data.tokenizer,
            batch_size=config.train.global_batch_size,
            sequence_length=config.train.sequence_length,
        )
        result = perplexity(
            graph,
            params,
            batches,
            text_bytes=data.held_out_bytes,
            chunk=config.train.loss_chunk,
        )
        logging.info(
            "Held-out text: %.4f nats a token, %.4f bits per byte (gzip -9: %.4f)",
            result["eval_ce"], result["eval_bits_per_byte"], data.gzip_bits_per_byte(),
        )  # fmt: skip
        return result

    model, steps = train(config, workdir, data, evaluate=evaluate)
    if steps == 0:
        print(
            f"The run in {workdir} is finished: {config.train.num_steps} steps. For more, give "
            "--config.train.num_steps=N; for another run, another --workdir."
        )
        return
    if config.train.sample_tokens:
        prompt = [data.tokenizer.bos_id]
        new = generate(
            model,
            [prompt],
            max_new_tokens=config.train.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            stop_tokens=(data.tokenizer.eos_id,),
            seed=config.train.seed,
        )
        print(f"\nWhat the model writes by itself:\n\n{data.tokenizer.decode(new[0])}")


if __name__ == "__main__":
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        # Large arrays on huge pages: on a CPU a fifth of a step is otherwise spent on page faults.
        # The C library reads this when a process starts, so the process starts again.
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    app.run(main)
