"""Qwen3-Next in JAX: train, fine-tune, study and evaluate."""

from qwen3next_jax import ops
from qwen3next_jax.checkpoint.hugging_face import load_hf, save_hf
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.inference.decode import Generation, generate
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.model.gated_attention import GatedAttention
from qwen3next_jax.model.gated_delta_net import GatedDeltaNet
from qwen3next_jax.model.layers import RMSNorm
from qwen3next_jax.model.moe import SparseMoE
from qwen3next_jax.model.mtp import MTP
from qwen3next_jax.training.loss import loss

__all__ = [
    "MTP",
    "GatedAttention",
    "GatedDeltaNet",
    "Generation",
    "ModelConfig",
    "Qwen3Next",
    "RMSNorm",
    "SparseMoE",
    "generate",
    "load_hf",
    "loss",
    "ops",
    "save_hf",
]
