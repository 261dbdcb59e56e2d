"""Weights in FP8 with one scale for each block, as in the released FP8 models.

Beside a matrix such as `o_proj.weight` [out, in] in float8_e4m3fn there is
`o_proj.weight_scale_inv`, of one number for each block of `weight_block_size` (in config.json);
blocks at the ends may be smaller. The weight is their product, which is computed in float32 as the
tensor is read, and rounded if bfloat16 is wanted: e4m3 times a bfloat16 scale fits in float32.
Nothing is computed in FP8 here, and nothing is written in it.
"""

import pathlib

import jax.numpy as jnp
import numpy as np

from qwen3next_jax.checkpoint import safetensors_files
from qwen3next_jax.checkpoint.parameters import shape_mismatches
from qwen3next_jax.checkpoint.safetensors_files import TensorFiles

_FP8 = np.dtype(jnp.float8_e4m3fn)
_DTYPES = {**safetensors_files.DTYPES, "F8_E4M3": _FP8}
_SCALE = "_scale_inv"


class ScaledFiles(TensorFiles):
    """Tensors in files, of which those in FP8 are multiplied by their scales when they are read.

    `stored` has no scales and says bfloat16 for FP8: such a parameter's dtype if none is requested.
    """

    def __init__(self, files: TensorFiles, block: tuple[int, int]):
        """Opens nothing yet. `block` has the rows and columns that share a scale."""
        self._files, self._block = files, block
        self._last: tuple[str, np.ndarray] | None = None
        stored = dict(files.stored)
        for name, s in files.stored.items():
            if s.dtype == _FP8:
                stored[name] = s._replace(dtype=np.dtype(jnp.bfloat16))
                stored.pop(name + _SCALE, None)
        super().__init__(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        if self._files.stored[name].dtype != _FP8:
            return self._files[name]
        # Parts of a tensor, such as a head's queries, are read one after another.
        if self._last is None or self._last[0] != name:
            self._last = None  # so that only one is in memory
            product = _product(self._files[name], self._files[name + _SCALE], self._block)
            self._last = (name, product)
        return self._last[1]


def read_directory(
    directory: pathlib.Path, block: tuple[int, int] | None
) -> tuple[TensorFiles, list[str], set[str]]:
    """`safetensors_files.read_directory`, which takes FP8 if `block` gives the size of its blocks.

    Returns:
      The same three; tensors in FP8 have a scale of the right shape, unless there are problems.
    """
    if block is None:
        return safetensors_files.read_directory(directory)
    files, problems, lost = safetensors_files.read_directory(directory, _DTYPES)
    scales = {}
    for name, s in files.stored.items():
        if s.dtype != _FP8:
            continue
        if len(s.shape) < 2:
            problems.append(f"unsupported dtype: {name} {list(s.shape)} is no matrix, but F8_E4M3")
            continue
        *experts, rows, columns = s.shape
        scales[name + _SCALE] = (*experts, -(-rows // block[0]), -(-columns // block[1]))
    for name in lost:
        files.stored.pop(name + _SCALE, None)  # not unexpected
    found = {name: files.stored[name].shape for name in scales if name in files}
    problems += shape_mismatches(scales, found, lost)
    return ScaledFiles(files, block), problems, lost


def _product(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    values = weight.astype(np.float32)
    rows, columns = block
    for i in range(scale.shape[-2]):
        of_columns = np.repeat(scale[..., i, :].astype(np.float32), columns, axis=-1)
        values[..., i * rows : (i + 1) * rows, :] *= of_columns[..., None, : values.shape[-1]]
    return values
