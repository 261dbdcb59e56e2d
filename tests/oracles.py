"""What several tests share: a small shape, models with random weights, packed rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3next_jax.config import ModelConfig
from qwen3next_jax.model.decoder import Qwen3Next

# config.json of the released Qwen3-Next-80B-A3B, but for keys that name tokens and versions.
RELEASED = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# One Gated DeltaNet layer, one of attention, no two sizes alike that could be mistaken.
SMALL = {
    "model_type": "qwen3_next",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
# Its dense sister, in the keys of such a model's config.json.
DENSE = {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 10000.0,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
}


def small_config(*, mtp_steps: int = 0, **changes) -> ModelConfig:
    """The config of a model that compiles and runs in seconds."""
    return ModelConfig.from_hf({**SMALL, **changes, "mtp_steps": mtp_steps})


def abstract_model(config: ModelConfig, **options) -> Qwen3Next:
    """A model of shapes alone, which `load_tensors` can fill."""
    return nnx.eval_shape(lambda: Qwen3Next(config, rngs=nnx.Rngs(0), **options))


def random_values(path: str, shape, rng: np.random.Generator, scale: float) -> np.ndarray:
    """Numbers like a trained model's: norms away from their start, decays of all speeds."""
    if path.endswith("A_log"):
        return np.log(rng.uniform(0.01, 16, shape))
    if path.endswith("dt_bias"):
        return rng.uniform(-2, 2, shape)
    if path.endswith("norm/weight") or "_norm_" in path:
        return rng.uniform(-0.5, 0.5, shape) + ("linear_attn" in path)
    if path.endswith("gate_up_proj"):
        # As if gate and up stood side by side: seeds were chosen for the models that this draws.
        *experts, two, D, F = shape
        return scale * np.moveaxis(rng.standard_normal((*experts, D, two, F)), -2, -3)
    return scale * rng.standard_normal(shape)


def random_module(abstract: nnx.Module, *, seed: int = 0, scale: float = 0.1):
    """Fills a module of shapes alone; numpy draws, so that nothing compiles."""
    rng = np.random.default_rng(seed)
    graph, params = nnx.split(abstract)
    flat = []
    for path, param in nnx.to_flat_state(params):
        values = random_values("/".join(map(str, path)), param.shape, rng, scale)
        flat.append((path, param.replace(jnp.asarray(values, param.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def random_model(config: ModelConfig, *, seed: int = 0, scale: float = 0.1, **options) -> Qwen3Next:
    """A model with random weights, norms and gates included."""
    return random_module(abstract_model(config, **options), seed=seed, scale=scale)


interprets_transposed = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="JAX's interpreter of GPU kernels takes no transposed factors before 0.11",
)


def quick_jit(function):
    """`jax.jit` for what runs a few times only: compiling without optimisations takes a quarter."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_allow_excess_precision": False,  # what is rounded to bfloat16 is to be rounded
    }
    if jax.__version_info__ < (0, 11):  # which know no other emitters
        options["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(function, compiler_options=options)


@functools.cache
def segments_of(*lengths: int, total: int) -> np.ndarray:
    """Segment ids [1, total] of documents packed one after the other, then padding."""
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(row, (0, total - len(row)))[None].astype(np.int32)


def relative_error(got, want, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of what is wanted, or over `floor` if that is larger."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), floor, 1e-30))
