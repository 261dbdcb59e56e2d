"""A run of seconds: a model of a few thousand parameters on texts made on the spot.

    python tests/small_run.py CORPUS WORKDIR [section.key=value ...]

takes it in a process of its own, for tests that kill it or give it other devices.
"""

import ast
import dataclasses
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import tiny  # noqa: E402
from qwen3next_jax.config import RunConfig  # noqa: E402
from qwen3next_jax.data.corpus import load_data  # noqa: E402
from qwen3next_jax.evaluation.perplexity import perplexity_in_training  # noqa: E402
from qwen3next_jax.evaluation.suites import suites_in_training  # noqa: E402
from qwen3next_jax.training import loop  # noqa: E402
from qwen3next_jax.training.workdir import workdir_lock  # noqa: E402


def write_corpus(folder):
    folder.mkdir(parents=True)
    for i in range(40):
        words = " ".join(f"word{(i * j) % 17} is {j * j % 101}," for j in range(30))
        (folder / f"{i}.txt").write_text(f"Text {i}. {words}\n")
    return folder


def small_config(corpus, **changes):
    """The tiny config, smaller; `changes` are `section__key=value`."""
    config = tiny.get_config()
    config.model.update(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        full_attention_interval=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    config.data.update(source="text", path=f"{corpus}/*.txt", holdout_fraction=0.2)
    config.optimizer.update(warmup_steps=2)
    config.train.update(
        num_steps=8, global_batch_size=8, sequence_length=48, checkpoint_every=3, log_every=1
    )
    for name, value in changes.items():
        section, key = name.split("__")
        config[section][key] = value
    return RunConfig.from_dict(config.to_dict())


def run(config, workdir, **hooks):
    workdir = pathlib.Path(workdir)
    with workdir_lock(workdir):
        return _run(config, workdir, **hooks)


def _run(config, workdir, **hooks):
    data = load_data(
        **dataclasses.asdict(config.data),
        vocab_size=config.model.vocab_size,
        trained_tokenizer=workdir / "tokenizer.model",
    )

    hooks = {
        "evaluate": perplexity_in_training(config.train, data),
        "suites": suites_in_training(config.evaluation, data),
        **hooks,
    }
    return loop.train(config, workdir, data, **hooks)


def is_time(name):
    """Whether a metric is a time, which differs between equal runs."""
    return name in ("tokens_per_second", "data_wait") or name.startswith("seconds/")


if __name__ == "__main__":
    changes = (item.split("=") for item in sys.argv[3:])
    changes = {key.replace(".", "__"): ast.literal_eval(value) for key, value in changes}
    run(small_config(sys.argv[1], **changes), sys.argv[2])
