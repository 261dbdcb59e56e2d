"""Samples of text from a model in training, for people to read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from qwen3next_jax.config import ModelConfig, TrainConfig
from qwen3next_jax.data.tokenizer import Tokenizer, encode_prompt
from qwen3next_jax.inference.decode import generate
from qwen3next_jax.model.decoder import Qwen3Next


def samples(
    model: Qwen3Next,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Continues each prompt with temperature 0.8 and top-p 0.95.

    Args:
      model: the model.
      tokenizer: the model's tokenizer.
      prompts: texts to continue; "" starts a document.
      max_new_tokens: most tokens to add to each, unless a stop token ends it before.
      seed: PRNG seed for sampling, in [0, 2**32).

    Returns:
      For each prompt, `prompt` and its continuation, `text`.
    """
    new = generate(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=0.8,
        top_p=0.95,
        stop_tokens=tokenizer.stop_ids,
        seed=seed,
    )
    return [
        {"prompt": prompt, "text": tokenizer.decode(tokens)}
        for prompt, tokens in zip(prompts, new, strict=True)
    ]


def samples_in_training(
    train: TrainConfig, config: ModelConfig, tokenizer: Tokenizer
) -> Callable[[Qwen3Next], list[dict[str, Any]]] | None:
    """The function that writes a training run's samples; None if it asks for none.

    Raises:
      ValueError: a prompt and `sample_tokens` more tokens do not fit into the model's context;
        names the longest prompt.
    """
    if not train.sample_tokens or not train.sample_prompts:
        return None
    prompts = train.sample_prompts
    length, longest = max((len(encode_prompt(tokenizer, text)), text) for text in prompts)
    if length + train.sample_tokens > config.context_length:
        raise ValueError(
            f"The sample prompt {longest!r} of {length} tokens and "
            f"train.sample_tokens={train.sample_tokens} exceed the model's context of "
            f"{config.context_length}; lower one of them"
        )
    return functools.partial(
        samples,
        tokenizer=tokenizer,
        prompts=prompts,
        max_new_tokens=train.sample_tokens,
        seed=train.seed,
    )
