"""How fast text is generated.

    python benchmarks/decode.py --batch=8 --vs=transformers      the same weights, turn by turn
        (--dtype=bfloat16: in bfloat16 on both sides)
    python benchmarks/decode.py --contexts=1024,4096,16384,65536  time per token over the context
    python benchmarks/decode.py --checkpoint=runs/tiny            with and without speculation

Decoding time is that of `--new` tokens less that of one token, both including the prefill; medians
over `--rounds`, in which the sides alternate. With --json the last line is one JSON object.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from shapes import config

from qwen3next_jax.checkpoint.hugging_face import load_tensors
from qwen3next_jax.checkpoint.load import load_checkpoint
from qwen3next_jax.data.tokenizer import load_tokenizer
from qwen3next_jax.inference.decode import Generation, generate
from qwen3next_jax.model.decoder import Qwen3Next


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--vs", choices=["transformers"])
    parser.add_argument("--contexts", help="prompt lengths, separated by commas")
    parser.add_argument("--checkpoint", help="a trained model with an MTP module")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.vs and args.shape == "dense":
        parser.error("--vs compares Qwen3-Next models; take another --shape")
    if args.checkpoint:
        result = speculation(args)
    elif args.contexts:
        result = curve(args)
    else:
        result = compare(args)
    if args.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, **result}))


def compare(args):
    model_config = config(args.shape)
    if args.vs:
        import torch

        theirs = reference(args.shape).to(getattr(torch, args.dtype))
        model = nnx.eval_shape(lambda: new_model(model_config, args))
        load_tensors(model, {name: p.float().numpy() for name, p in theirs.state_dict().items()})
    else:
        model = new_model(model_config, args)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model_config.vocab_size, (args.batch, args.prompt))

    def ours(new):
        return generate(model, prompts.tolist(), max_new_tokens=new, speculative=False)

    sides = {"ours": ours}
    if args.vs:
        sides["transformers"] = lambda new: reference_tokens(theirs, prompts, new)
    tokens = {name: run(args.new) for name, run in sides.items()}  # also compiles
    for run in sides.values():
        run(1)
    if args.vs:
        same = np.mean(np.array(tokens["ours"]) == np.array(tokens["transformers"]))
        print(f"{same:.1%} of the greedy tokens agree (from a tie on, texts differ)")
    times = {name: {1: [], args.new: []} for name in sides}
    for _ in range(args.rounds):
        for name, run in sides.items():
            for new in (1, args.new):
                times[name][new].append(seconds(lambda run=run, new=new: run(new)))
    result = {"batch": args.batch, "prompt": args.prompt, "new": args.new}
    for name, measured in times.items():
        first, whole = (statistics.median(measured[n]) for n in (1, args.new))
        step = (whole - first) / (args.new - 1)
        result[name] = {
            "tokens_per_second": args.batch / step,
            "step_seconds": step,
            "first_token_seconds": first,
            "tokens_per_second_with_prompt": args.batch * args.new / whole,
        }
        print(
            f"{name:>12}: {args.batch / step:7.0f} tokens/s decoding ({1e3 * step:.2f} ms a step), "
            f"first token after {1e3 * first:.0f} ms, in all {args.batch * args.new / whole:.0f} "
            "tokens/s"
        )
    if args.vs:
        for key in ("tokens_per_second", "tokens_per_second_with_prompt"):
            result[f"ratio_{key}"] = result["ours"][key] / result["transformers"][key]
        print(
            f"       ratio: {result['ratio_tokens_per_second']:.2f} decoding, "
            f"{result['ratio_tokens_per_second_with_prompt']:.2f} with reading the prompt"
        )
    return result


def curve(args):
    model_config = config(args.shape)
    model = new_model(model_config, args).unstacked()
    without = config(args.shape, layer_types=["linear_attention"] * model_config.num_hidden_layers)
    delta_only = new_model(without, args).unstacked()
    rng, points = np.random.default_rng(0), []
    for context in map(int, args.contexts.split(",")):
        prompts = rng.integers(0, model_config.vocab_size, (args.batch, context)).tolist()
        point = {"context": context}
        for name, m in {"hybrid": model, "delta_only": delta_only}.items():
            first, step = decode_times(m, prompts, args)
            point |= {f"{name}_step_seconds": step, f"{name}_prompt_seconds": first}
        points.append(point)
        print(
            f"{context:>7} tokens of context: {1e3 * point['hybrid_step_seconds']:.2f} ms a token; "
            f"with delta layers only {1e3 * point['delta_only_step_seconds']:.2f} ms; prompt read "
            f"in {point['hybrid_prompt_seconds']:.1f} s"
        )
    return {"batch": args.batch, "curve": points}


def new_model(model_config, args):
    return Qwen3Next(model_config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(args.dtype))


def decode_times(model, prompts, args):
    """Median seconds to the first token, and per further step, over `rounds` generations."""
    firsts, steps = [], []
    for round_ in range(args.rounds + 1):
        generation = Generation(model, prompts, max_new_tokens=args.new, speculative=False)
        start = time.monotonic()
        parts = iter(generation)
        next(parts)
        read = time.monotonic()
        for _ in parts:
            pass
        if round_:  # the first one compiles
            firsts.append(read - start)
            steps.append((time.monotonic() - read) / generation.passes)
    return statistics.median(firsts), statistics.median(steps)


def speculation(args):
    model = load_checkpoint(args.checkpoint)
    tokenizer = load_tokenizer(args.checkpoint)
    texts = ["def ", "import os\n\n\nclass ", "    def __init__(self, ", "        if not "]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    model, result = model.unstacked(), {"runs": []}
    for batch in (1, len(prompts)):
        for options in ({}, {"temperature": 0.8, "top_p": 0.95}):
            runs = {}
            for drafts in range(4):
                times, new_tokens, generation = [], 0, None
                for seed in range(args.rounds + 1):
                    generation = Generation(
                        model,
                        prompts[:batch],
                        max_new_tokens=args.new,
                        speculative=drafts,
                        seed=seed,
                        **options,
                    )
                    parts = iter(generation)
                    next(parts)
                    start = time.monotonic()
                    new_tokens = sum(len(row) for part in parts for row in part)
                    if seed:  # the first one compiles
                        times.append((time.monotonic() - start) / new_tokens)
                accepted = [
                    a / d for a, d in zip(generation.accepted, generation.drafted, strict=True)
                ]
                runs[drafts] = 1 / statistics.median(times)
                tokens_per_pass = new_tokens / generation.passes / batch
                result["runs"].append(
                    {
                        "batch": batch,
                        **options,
                        "drafts": drafts,
                        "acceptance": accepted,
                        "tokens_per_pass": tokens_per_pass,
                        "tokens_per_second": runs[drafts],
                    }
                )
                kind = "sampled" if options else "greedy"
                print(
                    f"batch {batch}, {kind}, {drafts} drafts: {runs[drafts]:.0f} tokens/s "
                    f"({runs[drafts] / runs[0]:.2f} times none), "
                    f"{tokens_per_pass:.2f} tokens a pass, accepted by place "
                    + (", ".join(f"{share:.0%}" for share in accepted) or "-")
                )
    return result


def reference(shape):
    import torch
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    fields = {**config(shape).to_hf(), "eos_token_id": None}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**fields)).eval()


def reference_tokens(model, prompts, new):
    import torch

    with torch.no_grad():
        out = model.generate(
            torch.tensor(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    return out[:, prompts.shape[1] :].tolist()


def seconds(run):
    start = time.monotonic()
    run()
    return time.monotonic() - start


if __name__ == "__main__":
    main()
