"""Samples of what a model in training writes, for people to read."""

from collections.abc import Sequence
from typing import Any

from qwen3next_jax.config import ModelConfig
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
    """Continues each prompt, drawn at temperature 0.8 from the likeliest 95%.

    Args:
      model: is not changed.
      tokenizer: the model's.
      prompts: "" is the start of a document.
      max_new_tokens: the most that is added to each; a text ends where the model ends it.
      seed: the same gives the same from the same model.

    Returns:
      Of each, `prompt` and `text`, what was added.
    """
    new = generate(
        model, [encode_prompt(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=0.8, top_p=0.95, stop_tokens=tokenizer.stop_ids, seed=seed,
    )  # fmt: skip
    return [
        {"prompt": prompt, "text": tokenizer.decode(tokens)}
        for prompt, tokens in zip(prompts, new, strict=True)
    ]


def check_samples(
    config: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[str], *, max_new_tokens: int
) -> None:
    """Refuses prompts that leave no room for what is to be added to them.

    Raises:
      ValueError: names the longest one.
    """
    length, longest = max((len(encode_prompt(tokenizer, text)), text) for text in prompts)
    if length + max_new_tokens > config.context_length:
        raise ValueError(
            f"The sample prompt {longest!r} of {length} tokens and "
            f"train.sample_tokens={max_new_tokens} exceed the model's context of "
            f"{config.context_length}; lower one of them"
        )
