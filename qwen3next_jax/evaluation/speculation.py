"""How many of the MTP module's drafts are accepted, by their place and by kind of text.

Prompts are the beginnings of documents, and the model goes on greedily from them. What is counted
belongs to a row and one pass over it, so it does not depend on which rows share a batch.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.data.documents import readable
from qwen3next_jax.data.sources import Records
from qwen3next_jax.evaluation.evaluator import Evaluator


def speculation(
    evaluator: Evaluator,
    domains: Mapping[str, Records],
    *,
    prompts: int = 16,
    prompt_length: int = 64,
    new_tokens: int = 64,
    drafts: int = 2,
    on_error: str = "raise",
) -> dict[str, Any]:
    """Counts accepted drafts.

    Args:
      evaluator: a model with an MTP module.
      domains: records by the name of what they are of.
      prompts: documents of each domain, the first of them with more than `prompt_length` tokens.
      prompt_length: tokens of each that are the prompt.
      new_tokens: the most that are written for each; a stop token ends it before.
      drafts: tokens drafted at a time.
      on_error: "raise", or "skip" records that cannot be used.

    Returns:
      `acceptance`, for each place in a draft the share of tokens that were accepted;
      `tokens_per_pass`, the accepted drafts and the model's own token; `drafted`, passes in which a
      row had a draft; `domains`, all of this for each.

    Raises:
      ValueError: the model has no MTP module, or no document is long enough.
    """
    check_mtp(evaluator.model.config)
    counts = {}
    for name, records in domains.items():
        found = readable(records, evaluator.tokenizer, on_error=on_error)
        long_enough = (d["tokens"] for _, d in found if len(d["tokens"]) > prompt_length)
        chosen = [
            tokens[:prompt_length].tolist() for tokens in itertools.islice(long_enough, prompts)
        ]
        if not chosen:
            raise ValueError(
                f"No document of {name} has more than prompt_length={prompt_length} tokens; give "
                "longer documents"
            )
        counts[name] = evaluator.count_drafts(chosen, max_new_tokens=new_tokens, drafts=drafts)
    total = [np.sum([part[i] for part in counts.values()], axis=0) for i in range(2)]
    return {
        **_shares(*total),
        "domains": {name: _shares(*part) for name, part in counts.items()},
    }


def check_mtp(config: ModelConfig) -> None:
    """Refuses, by a ValueError, a model without an MTP module."""
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
