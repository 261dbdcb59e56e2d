"""Weights in FP8 with one scale for each block, as in the released FP8 models.

Beside a matrix such as `o_proj.weight` [out, in] in float8_e4m3fn there is
`o_proj.weight_scale_inv`, of one number for each block of `weight_block_size` (in config.json);
blocks at the ends may be smaller. The weight is their product. It is computed in float32, only
where it is read, and rounded if bfloat16 is wanted. Nothing is computed in FP8 or written in it.
"""

import pathlib
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from qwen3next_jax.checkpoint import safetensors_files
from qwen3next_jax.checkpoint.parameters import shape_mismatches
from qwen3next_jax.checkpoint.safetensors_files import TensorFiles, View

_FP8 = np.dtype(jnp.float8_e4m3fn)
_DTYPES = {**safetensors_files.DTYPES, "F8_E4M3": _FP8}
# Stored dtypes, and the dtypes that parameters get if none is asked for.
READ_AS = {d: d if d != _FP8 else np.dtype(jnp.bfloat16) for d in _DTYPES.values()}
_SCALE = "_scale_inv"
_AT_ONCE = 2**22  # entries, which take 8 bytes each beside the product
_VALUES = np.arange(256, dtype=np.uint8).view(_FP8).astype(np.float32)  # a cast takes twice as long


class WeightFiles(TensorFiles):
    """A checkpoint's tensors, of which those in FP8 are multiplied by their scales when taken."""

    def __init__(self, files: TensorFiles, block: tuple[int, int]):
        """Opens nothing yet; a scale belongs to `block` = (rows, columns)."""
        super().__init__(files.stored)
        self._block = block

    def take(self, name: str, view: View) -> np.ndarray:
        """A view of a tensor; of one in FP8, the same view of its product, in float32."""
        weight = view(self[name])
        if weight.dtype != _FP8:
            return weight
        shape, scale = self.stored[name].shape, self[name + _SCALE].astype(np.float32)
        # For each axis of the tensor, the number of the block that each entry lies in.
        blocks = np.ix_(
            *(np.arange(n) // b for n, b in zip(shape, self._blocks(shape), strict=True))
        )
        # Broadcast arrays take no memory, nor do their views.
        blocks = tuple(view(np.broadcast_to(b, shape)) for b in blocks)
        values = np.empty(weight.shape, np.float32)
        rows = max(1, _AT_ONCE * len(weight) // weight.size)
        for i in range(0, len(weight), rows):
            some = slice(i, i + rows)
            np.multiply(
                np.take(_VALUES, weight[some].view(np.uint8)),
                scale[tuple(b[some] for b in blocks)],
                out=values[some],
            )
        return values

    def mismatches(
        self, weights: Mapping[str, tuple[int, ...]], lost: Collection[str]
    ) -> list[str]:
        """Names what is missing, unexpected or of another shape, be it weight or scale.

        Args:
          weights: expected shapes of all tensors but scales, by name.
          lost: names that are missing for a reason already reported.
        """
        problems = []
        wanted, found = dict(weights), {name: s.shape for name, s in self.stored.items()}
        for name, shape in weights.items():
            stored, scale = self.stored.get(name), name + _SCALE
            if stored is None or stored.shape != shape or stored.dtype not in READ_AS:
                found.pop(scale, None)  # the weight's own fault is reported
            elif stored.dtype == _FP8 and len(shape) < 2:
                problems.append(
                    f"unsupported dtype: {name} {list(shape)} is F8_E4M3, but no matrix"
                )
                found.pop(scale, None)
            elif stored.dtype == _FP8:
                sizes = zip(shape, self._blocks(shape), strict=True)
                wanted[scale] = tuple(-(-n // b) for n, b in sizes)
                if scale in self.stored and self.stored[scale].dtype == _FP8:
                    problems.append(f"unsupported dtype: {scale} is F8_E4M3, expected F32 or BF16")
        return problems + shape_mismatches(wanted, found, lost)

    def _blocks(self, shape):
        return (*[1] * (len(shape) - 2), *self._block)


def read_directory(
    directory: pathlib.Path, block: tuple[int, int] | None
) -> tuple[WeightFiles, list[str], set[str]]:
    """`safetensors_files.read_directory`, with FP8 if the size of its blocks is given."""
    dtypes = safetensors_files.DTYPES if block is None else _DTYPES
    files, problems, lost = safetensors_files.read_directory(directory, dtypes)
    return WeightFiles(files, block or (1, 1)), problems, lost
