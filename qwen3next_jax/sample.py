"""Generates text from a checkpoint, and prints it as it is generated.

    python -m qwen3next_jax.sample --checkpoint=DIR --prompt="Once upon a time"
    python -m qwen3next_jax.sample --checkpoint=DIR --chat --prompt="Who are you?" --temperature=0.7

Only the text goes to stdout; log and statistics go to stderr. Generation ends when the reader of
stdout closes it, as `head` does.
"""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import app, flags, logging

from qwen3next_jax.checkpoint.load import as_trained, load_checkpoint, open_checkpoint
from qwen3next_jax.command import enable_compilation_cache, friendly_errors
from qwen3next_jax.data.chat import render_chat
from qwen3next_jax.data.text_stream import TextStream
from qwen3next_jax.data.tokenizer import Tokenizer, encode_prompt, split_stops
from qwen3next_jax.inference.decode import DRAFTS, Generation, check_prompts, number_of_drafts
from qwen3next_jax.inference.sampling import Sampling
from qwen3next_jax.model.rope import describe_positions
from qwen3next_jax.parallel.mesh import fsdp_mesh

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A Hugging Face directory, a work directory, or one of its step folders."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "File or directory; else the checkpoint's.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [""], "Text to continue. Given several times, the rows of a batch: printed at the end"
)
_CHAT = flags.DEFINE_bool("chat", False, "Prompts are messages to the tokenizer's chat template.")
_SYSTEM = flags.DEFINE_string("system", None, "With --chat: the system message.")
_STOP = flags.DEFINE_multi_string("stop", [], "End before this string. May be given several times.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Most tokens to add.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0: the likeliest token; 1: the model's distribution.", lower_bound=0
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Sample from this many likeliest.", lower_bound=1)
_TOP_P = flags.DEFINE_float(
    "top_p",
    None,
    "Sample from the likeliest that together have this probability.",
    lower_bound=0,
    upper_bound=1,
)
_MIN_P = flags.DEFINE_float(
    "min_p",
    None,
    "Sample from those with at least this share of the likeliest one's probability.",
    lower_bound=0,
    upper_bound=1,
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1: tokens that were there become less likely."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", 0, 2**32 - 1)
_SPECULATIVE = flags.DEFINE_bool(
    "speculative", None, "Draft tokens with the MTP module; else done where the model has one."
)
_DRAFTS = flags.DEFINE_integer(
    "drafts", None, f"Tokens drafted at a time; {DRAFTS} if not given.", lower_bound=1
)
_YARN_FACTOR = flags.DEFINE_float(
    "yarn_factor", None, "YaRN: so many times the original context.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Else as stored.")
_MESH_FSDP = flags.DEFINE_integer(
    "mesh_fsdp", None, "Split the parameters over all devices: -1, or their number.", lower_bound=-1
)


@friendly_errors()
def main(argv: list[str]) -> None:
    """Loads the checkpoint and continues the prompts."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}; give text as --prompt='...'")
    if not _CHECKPOINT.value:
        raise app.UsageError("Where is the model? Give --checkpoint=DIR")
    if _SYSTEM.value is not None and not _CHAT.value:
        raise app.UsageError("--system is a message of a chat; give --chat as well")
    if _DRAFTS.value is not None and _SPECULATIVE.value is False:
        raise app.UsageError(f"--nospeculative contradicts --drafts={_DRAFTS.value}")
    if not _TEMPERATURE.value:
        for flag in (_TOP_K, _TOP_P, _MIN_P):
            if flag.value is not None:
                logging.warning("--%s has no effect at --temperature=0", flag.name)
    enable_compilation_cache()
    # Everything that can be checked quickly is checked before the model is loaded.
    sampling = Sampling(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
    )
    path = pathlib.Path(_CHECKPOINT.value)
    ours, config, tokenizer = open_checkpoint(path, _TOKENIZER.value)
    stop, stop_tokens = split_stops(tokenizer, _STOP.value)
    prompts = [_prompt_tokens(text, tokenizer) for text in _PROMPT.value]
    streams = [TextStream(tokenizer, stop) for _ in prompts]
    mesh = fsdp_mesh(_MESH_FSDP.value)
    yarn = None if _YARN_FACTOR.value is None else config.yarn(_YARN_FACTOR.value)
    if yarn is not None:
        config = dataclasses.replace(config, rope_scaling=yarn)
    check_prompts(config, prompts, _MAX_NEW_TOKENS.value)
    speculative = _DRAFTS.value or _SPECULATIVE.value
    number_of_drafts(config, speculative)
    model = load_checkpoint(path, dtype=_DTYPE.value, mesh=mesh, rope_scaling=yarn, unstacked=True)
    logging.info("%s", describe_positions(model.config))
    with as_trained(ours):
        generation = Generation(
            model,
            prompts,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            **dataclasses.asdict(sampling),
            stop_tokens=(*tokenizer.stop_ids, *stop_tokens),
            seed=_SEED.value,
            speculative=speculative,
        )
        try:
            speed = _write(generation, streams)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has closed the pipe
            # Python flushes the buffer at exit, which would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
    print(_report(speed, generation), file=sys.stderr)


def _prompt_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    if not _CHAT.value:
        return encode_prompt(tokenizer, text)
    messages = [{"role": "user", "content": text}]
    if _SYSTEM.value is not None:
        messages = [{"role": "system", "content": _SYSTEM.value}, *messages]
    rendered = render_chat(
        messages, tokenizer.chat_template, special_tokens=tokenizer.special_tokens
    )
    return tokenizer.encode(rendered, parse_special=True)


@dataclasses.dataclass(frozen=True)
class _Speed:
    texts: int
    tokens: int
    later_tokens: int  # without the first ones, whose time includes prefill and compilation
    first_seconds: float
    later_seconds: float


def _write(generation: Generation, streams: Sequence[TextStream]) -> _Speed:
    """Prints the rows' texts: a single one as it is generated, several at the end."""
    single = len(streams) == 1
    start = first = time.perf_counter()
    tokens = first_tokens = 0
    for item in generation:
        for row, new in enumerate(item):
            stream = streams[row]
            if stream.stopped:
                continue
            tokens += len(new)
            text = stream.feed(new)
            if single:
                print(text, end="", flush=True)
            if stream.stopped:
                generation.stop(row)
        if not first_tokens:
            first, first_tokens = time.perf_counter(), tokens
    end = time.perf_counter()
    for row, stream in enumerate(streams):
        rest = stream.finish()
        if single:
            print(rest, flush=True)
        else:
            print(f"=== {row + 1} ===\n{stream.text}")
    return _Speed(len(streams), tokens, tokens - first_tokens, first - start, end - first)


def _report(speed: _Speed, generation: Generation) -> str:
    line = f"{speed.tokens} tokens, the first after {speed.first_seconds:.1f} s"
    if speed.later_tokens:
        rate = speed.later_tokens / speed.later_seconds
        line += f", then {rate:.1f} tokens/s in {speed.later_seconds:.1f} s"
    if generation.drafted and generation.passes:
        a_pass = speed.later_tokens / generation.passes / speed.texts
        line += f", {a_pass:.2f} tokens a pass" + (" and text" if speed.texts > 1 else "")
        shares = [
            f"{accepted / drafted:.0%} of {drafted}" if drafted else "none drafted"
            for accepted, drafted in zip(generation.accepted, generation.drafted, strict=True)
        ]
        line += f"; drafts accepted, by position: {', '.join(shares)}"
    return line


if __name__ == "__main__":
    app.run(main)
