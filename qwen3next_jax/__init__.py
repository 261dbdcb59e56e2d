"""Qwen3-Next in JAX: train, fine-tune, study and evaluate."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3next_jax import ops
    from qwen3next_jax.checkpoint.hugging_face import load_hf, save_hf
    from qwen3next_jax.checkpoint.load import load_checkpoint
    from qwen3next_jax.config import ModelConfig
    from qwen3next_jax.inference.decode import Generation, generate
    from qwen3next_jax.model.decoder import Qwen3Next
    from qwen3next_jax.model.gated_attention import GatedAttention
    from qwen3next_jax.model.gated_delta_net import GatedDeltaNet
    from qwen3next_jax.model.layers import RMSNorm
    from qwen3next_jax.model.moe import SparseMoE
    from qwen3next_jax.model.mtp import MTP
    from qwen3next_jax.training.loss import complete_batch, loss

__all__ = [
    "MTP",
    "GatedAttention",
    "GatedDeltaNet",
    "Generation",
    "ModelConfig",
    "Qwen3Next",
    "RMSNorm",
    "SparseMoE",
    "complete_batch",
    "generate",
    "load_checkpoint",
    "load_hf",
    "loss",
    "ops",
    "save_hf",
]

# The module that defines each name. It is imported when the name is first used: JAX takes seconds
# to import, and what only reads configs, logs or flags does without it.
_MODULES = {
    "MTP": "model.mtp",
    "GatedAttention": "model.gated_attention",
    "GatedDeltaNet": "model.gated_delta_net",
    "Generation": "inference.decode",
    "ModelConfig": "config",
    "Qwen3Next": "model.decoder",
    "RMSNorm": "model.layers",
    "SparseMoE": "model.moe",
    "complete_batch": "training.loss",
    "generate": "inference.decode",
    "load_checkpoint": "checkpoint.load",
    "load_hf": "checkpoint.hugging_face",
    "loss": "training.loss",
    "save_hf": "checkpoint.hugging_face",
}

if not TYPE_CHECKING:  # for a type checker, a module with a `__getattr__` has every name

    def __getattr__(name: str) -> Any:
        if name == "ops":
            return importlib.import_module("qwen3next_jax.ops")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"qwen3next_jax.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
