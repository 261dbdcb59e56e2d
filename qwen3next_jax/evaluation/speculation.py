"""How many of the MTP module's drafts are accepted, by position in the draft and by domain.

Prompts are the beginnings of documents, which the model continues greedily. Drafts are counted for
each row and pass, so the counts do not depend on which rows share a batch.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.data.documents import readable
from qwen3next_jax.data.sources import Records
from qwen3next_jax.data.tokenizer import Tokenizer
from qwen3next_jax.evaluation.evaluator import Evaluator

PROMPT_LENGTH, NEW_TOKENS = 64, 64


def speculation(
    evaluator: Evaluator,
    domains: Mapping[str, Records],
    *,
    prompts: int = 16,
    prompt_length: int = PROMPT_LENGTH,
    new_tokens: int = NEW_TOKENS,
    drafts: int = 2,
    on_error: str = "raise",
) -> dict[str, Any]:
    """Counts accepted drafts.

    Args:
      evaluator: a model with an MTP module.
      domains: records by the name of their domain.
      prompts: number of documents of each domain: its first ones with more than `prompt_length`
        tokens.
      prompt_length: tokens of each document that are the prompt.
      new_tokens: most tokens to generate for each, unless a stop token ends it before.
      drafts: tokens drafted at a time.
      on_error: "raise", or "skip" records that cannot be used.

    Returns:
      `acceptance`, the share of accepted tokens by position in the draft; `tokens_per_pass`, the
      mean number of accepted drafts and the model's own token; `drafted`, the number of drafts,
      one for each row and pass; `domains`, all of this for each domain with a document long enough.

    Raises:
      ValueError: the model has no MTP module, or a context too short; or no document of any domain
        is long enough.
    """
    check_drafting(evaluator.model.config, prompt_length + new_tokens)
    chosen = beginnings(
        domains, evaluator.tokenizer, count=prompts, length=prompt_length, on_error=on_error
    )
    counts = {
        name: evaluator.count_drafts(tokens, max_new_tokens=new_tokens, drafts=drafts)
        for name, tokens in chosen.items()
    }
    total = [np.sum([part[i] for part in counts.values()], axis=0) for i in range(2)]
    return {
        **_shares(*total),
        "domains": {name: _shares(*part) for name, part in counts.items()},
    }


def beginnings(
    domains: Mapping[str, Records],
    tokenizer: Tokenizer,
    *,
    count: int = 1,
    length: int = PROMPT_LENGTH,
    on_error: str = "raise",
) -> dict[str, list[list[int]]]:
    """The first `length` tokens of the first `count` documents of each domain that are longer.

    A domain without such a document is left out with a warning.

    Raises:
      ValueError: no domain has such a document.
    """
    chosen = {}
    for name, records in domains.items():
        documents = readable(records, tokenizer, on_error=on_error)
        long_enough = (d["tokens"] for _, d in documents if len(d["tokens"]) > length)
        chosen[name] = [tokens[:length].tolist() for tokens in itertools.islice(long_enough, count)]
    without = [name for name, prompts in chosen.items() if not prompts]
    if without:
        problem = f"No document of {', '.join(without)} has more than {length} tokens"
        if len(without) == len(chosen):
            raise ValueError(f"{problem}; give longer documents, or leave speculation out")
        logging.warning("%s: speculation leaves these texts out", problem)
    return {name: prompts for name, prompts in chosen.items() if prompts}


def check_drafting(config: ModelConfig, length: int = PROMPT_LENGTH + NEW_TOKENS) -> None:
    """Raises a ValueError if the model has no MTP module, or a context shorter than `length`."""
    if length > config.context_length:
        raise ValueError(
            f"speculation reads and writes {length} tokens, and the model's context has "
            f"{config.context_length}; leave the suite out"
        )
    if not config.mtp_steps:
        raise ValueError(
            "speculation needs an MTP module, and this model has none (mtp_steps=0); leave the "
            "suite out"
        )


def _shares(drafted: np.ndarray, accepted: np.ndarray) -> dict[str, Any]:
    passes = max(int(drafted[0]), 1)
    return {
        "acceptance": (accepted / np.maximum(drafted, 1)).tolist(),
        "tokens_per_pass": float(1 + accepted.sum() / passes),
        "drafted": int(drafted[0]),
    }
