"""Our parameters or gradients as Hugging Face tensors, for comparison with transformers."""

from typing import Any

import numpy as np

from qwen3next_jax.checkpoint.hugging_face import checked_table, expert_layouts
from qwen3next_jax.checkpoint.tensor_table import FileLayout
from qwen3next_jax.config import ModelConfig
from qwen3next_jax.parallel.names import named_leaves


def dump_tensors(
    params: Any, config: ModelConfig, *, fused_experts: bool = False
) -> dict[str, np.ndarray]:
    """Parameters, or anything of their structure such as gradients, under Hugging Face's names.

    Raises:
      ValueError: names every missing, unexpected and misshapen parameter.
    """
    flat = {path: np.asarray(x) for path, x in named_leaves(params)}
    layout = FileLayout(fused=expert_layouts("fused" if fused_experts else "per_expert"))
    table = checked_table(config, layout, flat)
    dtypes = {name: x.dtype for path, x in flat.items() for name in table.tensors_of(path)}
    tensors = {name: np.empty(shape, dtypes[name]) for name, shape in table.shapes.items()}
    for path, x in flat.items():
        table.write(tensors, path, (slice(None),) * x.ndim, x)
    return tensors
