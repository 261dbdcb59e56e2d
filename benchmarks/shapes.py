"""The model shapes that benchmarks are run at."""

from qwen3next_jax.config import ModelConfig

# A sparse hybrid that two CPU cores can train: 30 M parameters, 7 M of them active.
SMALL = {
    "model_type": "qwen3_next",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "max_position_embeddings": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}

# Qwen3-Next-80B-A3B: for single operations and layers.
FULL = {
    **SMALL,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}

# Layers of the 80B model, but only as many, and with as many experts, as one GPU of 140 GB can
# train: 4.4 billion parameters, of which a token uses 1.4 billion.
CARD = {**FULL, "num_hidden_layers": 16, "num_experts": 64}

# A dense model with 0.41 of the small one's parameters. That is also the ratio of Qwen3-32B to the
# 80B model, which its authors call equal in quality.
DENSE = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "max_position_embeddings": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_theta": 10_000_000.0,
    "intermediate_size": 1408,
    "tie_word_embeddings": False,
}

SHAPES = {"small": SMALL, "dense": DENSE, "80b": FULL, "card": CARD}


def config(shape: str, **changes) -> ModelConfig:
    return ModelConfig.from_hf({**SHAPES[shape], **changes})
