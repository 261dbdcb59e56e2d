"""Fine-tunes a model on chats by low-rank updates (LoRA), in a training loop of one's own.

    python examples/lora.py --model=DIR --chats='chats/*.jsonl' --output=MERGED [--rank=16]

    W + (α / r) A B     W [in, out] as it is, A [in, r] and B [r, out] trained, B zero at first

DIR is a Hugging Face directory with a tokenizer and a chat template, MERGED becomes another one,
with the sums for weights. `MATRICES` are those that have updates; the experts have none: they hold
most of the parameters, and the update of each would see few tokens.

The sums are formed anew in each step, before the model is called, so that no module has to know of
them; the gradient of a sum exists for a moment, gradients and moments of all else never do. The
weights stay, and the model computes, in the dtype of the files; A and B are float32. Chats that are
longer than a row lose their ends. There are no checkpoints: a run that is killed begins again, and
`train.py` is for those that take longer.

Source: Hu et al., LoRA, arXiv:2106.09685.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import qwen3next_jax as q3n  # noqa: E402
from configs import sft  # noqa: E402
from qwen3next_jax.command import friendly_errors  # noqa: E402
from qwen3next_jax.config import RunConfig  # noqa: E402
from qwen3next_jax.data.corpus import load_data  # noqa: E402
from qwen3next_jax.data.pipeline import training_batches  # noqa: E402
from qwen3next_jax.data.tokenizer import keep_tokenizer  # noqa: E402
from qwen3next_jax.evaluation.perplexity import perplexity_in_training  # noqa: E402
from qwen3next_jax.parallel.mesh import BATCH, make_mesh  # noqa: E402
from qwen3next_jax.parallel.names import map_leaves, named_leaves  # noqa: E402

# How the paths of the matrices with updates end, and how many axes are inputs and outputs. Experts
# have one axis more, and are left out.
MATRICES = {
    r".*self_attn/(q|k|v|gate)_proj": (1, 2),
    r".*self_attn/o_proj": (2, 1),
    r".*linear_attn/[qkvz]_proj": (1, 2),
    r".*linear_attn/out_proj": (2, 1),
    r".*mlp/(shared_expert/)?(gate|up|down)_proj": (1, 1),
}


def new_updates(params, *, rank, seed=0):
    """A and B of each matrix, by its path: {path: (A [..., in, rank], B [..., rank, out])}.

    Layers of one kind are stacked, and so are their updates.
    """
    updates, key = {}, jax.random.key(seed)
    for number, (path, w) in enumerate(named_leaves(params)):
        stacked = int(path.startswith("groups/"))
        axes = next((axes for ends, axes in MATRICES.items() if re.fullmatch(ends, path)), None)
        if axes is None or w.ndim != stacked + sum(axes):
            continue
        layers, rest = w.shape[:stacked], w.shape[stacked:]
        size_in, size_out = math.prod(rest[: axes[0]]), math.prod(rest[axes[0] :])
        a = jax.random.normal(jax.random.fold_in(key, number), (*layers, size_in, rank))
        updates[path] = (a / size_in**0.5, jnp.zeros((*layers, rank, size_out)))
    return updates


def summed(params, updates, *, scale):
    """The parameters with their updates, in their dtypes; added in float32."""

    def add(path, w):
        if path not in updates:
            return w
        a, b = updates[path]
        return (w + scale * (a @ b).reshape(w.shape)).astype(w.dtype)

    return map_leaves(add, params)


def run_config(args):
    """A fine-tuning run's config, for its data, its mesh and the sizes of its batches."""
    config = sft.get_config(args.model)
    config.data.update(
        path=args.chats,
        holdout_fraction=args.holdout_fraction,
        num_shards=1,
        too_long="truncate",
    )
    config.train.update(
        num_steps=args.steps,
        global_batch_size=args.batch,
        sequence_length=args.length,
        loss_chunk=min(256, args.length),
    )
    return RunConfig.from_dict(config.to_dict())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--chats", required=True, help="JSONL files (docs/finetuning.md)")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a new directory")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--holdout_fraction", type=float, default=0.02)
    args = parser.parse_args(argv)
    if args.output.exists():  # said now, not after the training
        parser.error(f"--output={args.output} exists; name a new directory")
    if args.rank < 1:
        parser.error(f"--rank={args.rank} must be at least 1")
    logging.set_verbosity(logging.INFO)

    config = run_config(args)
    data = load_data(
        **dataclasses.asdict(config.data),
        vocab_size=config.model.vocab_size,
        trained_tokenizer="",  # the model's own is taken
    )
    t, mesh = config.train, make_mesh(config.mesh)
    rows = training_batches(
        data, batch_size=t.global_batch_size, sequence_length=t.sequence_length, seed=t.seed
    )
    evaluate = perplexity_in_training(t, data)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.linear_schedule(args.learning_rate, 0.0, t.num_steps)),
    )
    with jax.set_mesh(mesh):
        model = q3n.load_hf(args.model, mesh=mesh)
        model.remat = t.remat
        graph, params = nnx.split(model)

        def with_updates(params, updates):
            return summed(params, updates, scale=args.alpha / args.rank)

        everywhere = NamedSharding(mesh, PartitionSpec())  # every device has all of A and B

        @functools.partial(jax.jit, donate_argnums=(1, 2), out_shardings=everywhere)
        def step(params, updates, state, batch):
            def loss(updates):
                summed_up = nnx.merge(graph, with_updates(params, updates))
                return q3n.loss(summed_up, batch, chunk=t.loss_chunk)

            (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(updates)
            changes, state = optimizer.update(gradients, state)
            return optax.apply_updates(updates, changes), state, metrics["ce"]

        updates = jax.device_put(new_updates(params, rank=args.rank), everywhere)
        trained, all_ = (sum(x.size for x in jax.tree.leaves(p)) for p in (updates, params))
        logging.info("%s parameters, and %s in updates", f"{all_:,}", f"{trained:,}")
        state = jax.device_put(optimizer.init(updates), everywhere)
        before = evaluate(model)["eval_ce"]
        for number in range(1, t.num_steps + 1):
            batch = jax.device_put(next(rows), NamedSharding(mesh, BATCH))
            updates, state, ce = step(params, updates, state, batch)
            if number % 10 == 0:
                logging.info("Step %d: %.4f nats a token", number, ce)
        # Not as one jitted function, which would copy the weights that have no updates.
        merged = nnx.merge(graph, with_updates(params, updates))
        after = evaluate(merged)["eval_ce"]
    q3n.save_hf(merged, args.output)
    keep_tokenizer(data.tokenizer, args.output, ends=data.ends())
    print(f"Held-out answers: {before:.4f} nats a token before, {after:.4f} now in {args.output}")
    return before, after


if __name__ == "__main__":
    with friendly_errors():
        main()
