"""The configs: `ModelConfig`, the shape of a model, and `RunConfig`, a whole training run."""

from qwen3next_jax.config.checks import divisors, flatten, nearest, read_json, require_known
from qwen3next_jax.config.model import FULL, LINEAR, ModelConfig, fp8_block
from qwen3next_jax.config.run import (
    AXES,
    REMAT,
    SOURCES,
    SUITES,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    axis_problems,
)

__all__ = [
    "AXES",
    "FULL",
    "LINEAR",
    "REMAT",
    "SOURCES",
    "SUITES",
    "EvaluationConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainConfig",
    "axis_problems",
    "divisors",
    "flatten",
    "fp8_block",
    "nearest",
    "read_json",
    "require_known",
]
