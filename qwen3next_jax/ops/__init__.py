"""The model's operations: pure functions, each an equation with several implementations.

To call them inside your own `jax.shard_map`, give it `check_vma=False`: their loops start from
constants, which the check of varying manual axes refuses.
"""

from qwen3next_jax.ops.attention import attention
from qwen3next_jax.ops.causal_conv import causal_conv
from qwen3next_jax.ops.cross_entropy import cross_entropy
from qwen3next_jax.ops.delta_rule import gated_delta_rule
from qwen3next_jax.ops.grouped_matmul import grouped_matmul

__all__ = ["attention", "causal_conv", "cross_entropy", "gated_delta_rule", "grouped_matmul"]
