"""Trains a model on retrieval, and evaluates it far beyond the length of its training.

    python examples/retrieval.py [--workdir=DIR] [--steps=N]

This trains two layers, one Gated DeltaNet and one of gated attention, for minutes on two CPU cores.
A row is a text in which sentences bind magic words to things, among sentences of noise, followed by
questions about them; only the answers are in the loss. No row is longer than 256 tokens. Then the
suite `long_context` evaluates the model from 128 tokens to many times 256, with YaRN beyond 256,
and a figure shows its score by length and depth.

One layer is not enough: the delta layer's convolution tells each word what stands before it, and
only then can attention find the word that follows the thing in question.

The work directory is an ordinary one; the same evaluation is

    python eval.py --workdir=DIR --suite=long_context --tasks=niah_single,niah_multikey
"""

import argparse
import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import tokenizers
from absl import logging

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import tiny  # noqa: E402
from qwen3next_jax.config import RunConfig  # noqa: E402
from qwen3next_jax.data.corpus import load_data  # noqa: E402
from qwen3next_jax.data.files import import_extra  # noqa: E402
from qwen3next_jax.data.tokenizer import keep_tokenizer, load_tokenizer  # noqa: E402
from qwen3next_jax.evaluation import long_context as suite  # noqa: E402
from qwen3next_jax.evaluation.evaluator import Evaluator  # noqa: E402
from qwen3next_jax.training.loop import train  # noqa: E402
from qwen3next_jax.training.workdir import workdir_lock  # noqa: E402

CONTEXT = 256  # tokens of a row
TASKS = ("niah_single", "niah_multikey")

# The user's message is the text with its question, exactly as the suite asks it.
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- message.content }}
    {%- else %}
        {% generation %}
        {{- ' ' + message.content + eos_token }}
        {% endgeneration %}
    {%- endif %}
{%- endfor %}
"""


def write_tokenizer(folder):
    """A tokenizer.json whose tokens are the words of the suite's texts, and its template."""
    words = {"<eos>": 0, "<unk>": 1}
    rng = np.random.default_rng(0)
    texts = [*suite.KEYS, *suite.WORDS]
    for make in suite.TASKS.values():
        question = make(rng)
        texts += [*question.found, *question.distractors, question.question, *question.noise]
    for word in re.findall(r"\w+|[^\w\s]+", " ".join(texts)):
        words.setdefault(word, len(words))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<eos>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(folder)


def write_chats(path, *, rows):
    """Texts of many lengths with one to eight magic words, and a question about each."""
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        for _ in range(rows):
            keys = int(rng.integers(1, 9))
            names, words = rng.permutation(suite.KEYS)[:keys], rng.permutation(suite.WORDS)[:keys]
            bindings = [suite.magic_word_is(n, w) for n, w in zip(names, words, strict=True)]
            # At most as many sentences as leave room for the questions, but mostly few, since the
            # model learns fastest from short texts.
            most = (CONTEXT - 25 * keys - 10) // 7
            noise = [str(x) for x in rng.choice(suite.NOISE, int(most ** rng.uniform(0, 1)))]
            for binding in bindings:
                noise.insert(int(rng.integers(len(noise) + 1)), binding)
            messages, text = [], " ".join(noise)
            for i in rng.permutation(keys):
                question = text + suite.which_magic_word(names[i])
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": str(words[i])})
                text = ""
            file.write(json.dumps({"messages": messages}) + "\n")


def config(folder, tokenizer, *, steps):
    run = tiny.get_config()
    run.model.update(
        vocab_size=-(-tokenizer.vocab_size // 8) * 8,
        hidden_size=64,
        num_hidden_layers=2,
        full_attention_interval=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.08,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        mtp_steps=0,
    )
    run.data.update(
        source="jsonl",
        path=str(folder / "chats.jsonl"),
        field="messages",
        tokenizer=str(folder / "tokenizer.json"),
        packing="best_fit",
        holdout_fraction=0.01,
    )
    run.optimizer.update(name="muon", learning_rate=1e-2, warmup_steps=30, weight_decay=0.01)
    run.train.update(
        num_steps=steps,
        global_batch_size=32,
        sequence_length=CONTEXT,
        sample_tokens=0,
        log_every=20,
        checkpoint_every=0,
    )
    return RunConfig.from_dict(run.to_dict())


def plot(cells, path):
    """A heat map of depth over length for each task, with the training context marked."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(TASKS), figsize=(11, 3.4), sharey=True, layout="constrained"
    )
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    for panel, task in zip(panels, TASKS, strict=True):
        score = {(c["depth"], c["length"]): c["score"] for c in cells if c["task"] == task}
        grid = np.array([[score[d, n] for n in lengths] for d in depths])
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
        panel.set(title=task, xlabel="tokens")
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.axvline(lengths.index(CONTEXT) + 0.5, color="black", linewidth=2)
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=panels, label="score")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/retrieval"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=4)
    args = parser.parse_args(argv)
    import_extra("matplotlib", extra="examples")  # before the work, not after it
    logging.set_verbosity(logging.INFO)
    with workdir_lock(args.workdir):
        tokenizer = write_tokenizer(args.workdir / "data")
        write_chats(args.workdir / "data" / "chats.jsonl", rows=20_000)
        run = config(args.workdir / "data", tokenizer, steps=args.steps)
        data = load_data(
            **dataclasses.asdict(run.data),
            vocab_size=run.model.vocab_size,
            trained_tokenizer=args.workdir / "tokenizer.model",
        )
        keep_tokenizer(tokenizer, args.workdir)
        model, _ = train(run, args.workdir, data)
    lengths = [n for n in (128, 256, 512, 1024, 2048, 4096, 8192, 16384) if n <= args.longest]
    result = suite.long_context(
        Evaluator(model, tokenizer), tasks=TASKS, lengths=lengths, samples=args.samples
    )
    (args.workdir / "long_context.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result["cells"], args.workdir / "long_context.png")
    return result


if __name__ == "__main__":
    main()
