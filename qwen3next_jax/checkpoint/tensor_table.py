"""Hugging Face tensors and our parameters, as one table of names, shapes and rearrangements.

Each `Entry` is one of their tensors and its places in our parameters. For each place there is a
numpy *view* of the tensor with the same numbers in the same order: `ours[place] = view(theirs)`
reads and `view(theirs)[...] = ours[place]` writes. So one line of the table serves both directions,
and numbers are moved, not changed. Because a view costs nothing, any block of a parameter is
assembled from the tensors that overlap it, and no other data is touched. The two sides ("there"
and "here") differ as follows:
- a Linear's matrix is [out, in] there, and [in, heads..., ...] here;
- `in_proj_qkvz` holds, key head by key head, [q | k | its value heads' v | their z];
  `in_proj_ba` likewise [b | a]; `conv1d` holds all q channels, then all k, then all v;
- with an output gate, `q_proj` holds [query | gate] head by head;
- experts are one tensor each, or fused as [E, 2F, D] and [E, D, F];
- layers are separate there, and stacked over the repeats of their group here.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from qwen3next_jax.checkpoint.safetensors_files import View
from qwen3next_jax.config import LINEAR, ModelConfig

Block = tuple[slice, ...]
Take = Callable[[str, View], np.ndarray]  # from a tensor's name and a view to that view of it


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The ways in which files of the same model may differ."""

    # The parts ("model", "mtp") whose experts are fused into one tensor per layer.
    fused: tuple[str, ...] = ()
    # Whether an output head that is tied to the embedding is stored a second time.
    tied_head: bool = False

    @classmethod
    def of(cls, names: Collection[str], config: ModelConfig) -> "FileLayout":
        """The layout of files that hold tensors of these names."""
        fused = {n.partition(".")[0] for n in names if n.endswith("experts.gate_up_proj")}
        tied_head = config.tie_word_embeddings and "lm_head.weight" in names
        return cls(fused=tuple(sorted(fused)), tied_head=tied_head)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "FileLayout":
        """The inverse of `dataclasses.asdict`, after a round trip through JSON."""
        return cls(fused=tuple(given["fused"]), tied_head=given["tied_head"])


class Part(NamedTuple):
    """A place in one of our parameters, and the view of the tensor that belongs there."""

    path: str
    place: Block  # slice(None) for a whole axis
    view: View


class Entry(NamedTuple):
    """One of their tensors; its parts cover each of its numbers once."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class TensorTable:
    """All entries of a model; reads and writes any block of a parameter."""

    def __init__(
        self,
        config: ModelConfig,
        layout: FileLayout,
        parameters: Mapping[str, tuple[int, ...]],
        new: Collection[str] = (),
    ):
        """Builds the table.

        Args:
          config: the model's config.
          layout: the layout of their files.
          parameters: shapes of our parameters by path.
          new: paths of parameters that are left out if no tensor holds them.

        Raises:
          ValueError: no tensor holds another parameter, as of a variant of the model.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[str, Part]]] = {path: [] for path in parameters}
        for name, shape, parts in entries(config, layout):
            self.shapes[name] = shape
            for part in parts:
                self._parts[part.path].append((name, part))
        lost = {path for path, parts in self._parts.items() if not parts}
        self.parameters = {path: shape for path, shape in parameters.items() if path not in lost}
        if lost := lost.difference(new):
            raise ValueError(
                f"No tensor of Hugging Face's models holds {', '.join(sorted(lost))}; save "
                "checkpoints (`CheckpointStore`) of such a model, or add its tensors to `entries`"
            )
        # By path, the start and stop of each part along each axis: [parts, axes, 2].
        self._bounds = {
            path: np.array([_bounds(part.place, parameters[path]) for _, part in parts])
            for path, parts in self._parts.items()
            if parts
        }

    def tensors_of(self, path: str) -> list[str]:
        """The names of the tensors that make up a parameter."""
        return list(dict.fromkeys(name for name, _ in self._parts[path]))

    def read(self, take: Take, path: str, block: Block, dtype: np.dtype) -> np.ndarray:
        """Assembles a block of one of our parameters from the tensors that overlap it."""
        values = np.empty(
            [stop - start for start, stop in _bounds(block, self.parameters[path])], dtype
        )
        for ours, name, view in self._overlaps(path, block):
            values[ours] = take(name, view)
        return values

    def write(
        self, tensors: Mapping[str, np.ndarray], path: str, block: Block, values: np.ndarray
    ) -> None:
        """Writes a block of one of our parameters to its places in their tensors."""
        for ours, name, view in self._overlaps(path, block):
            view(tensors[name])[...] = values[ours]

    def _overlaps(self, path: str, block: Block) -> Iterator[tuple[Block, str, View]]:
        """Yields, for each overlapping tensor, an index into the block, its name, and the view."""
        bounds = _bounds(block, self.parameters[path])
        starts = np.maximum(self._bounds[path][..., 0], bounds[:, 0])
        stops = np.minimum(self._bounds[path][..., 1], bounds[:, 1])
        for i in np.flatnonzero((starts < stops).all(axis=1)):
            name, part = self._parts[path][i]
            inside, there = (
                tuple(map(slice, starts[i] - origin, stops[i] - origin))
                for origin in (bounds[:, 0], self._bounds[path][i, :, 0])
            )
            yield inside, name, partial(_within, view=part.view, there=there)


def entries(config: ModelConfig, layout: FileLayout) -> Iterator[Entry]:
    """The table: every tensor once, and every number of every parameter once."""
    c, D = config, config.hidden_size
    yield _same("model.embed_tokens.weight", "embed_tokens", (c.vocab_size, D))
    yield _same("model.norm.weight", "norm/weight", (D,))
    if layout.tied_head:
        yield _same("lm_head.weight", "embed_tokens", (c.vocab_size, D))
    elif not c.tie_word_embeddings:
        yield _linear("lm_head.weight", "lm_head", (D,), (c.vocab_size,))
    for i, (mixer, sparse) in enumerate(c.layers):
        repeat, place = divmod(i, len(c.group))
        for entry in _layer(c, mixer, sparse, "model" in layout.fused):
            yield _placed(entry, f"model.layers.{i}.", f"groups/layers/{place}/", repeat)
    if c.mtp_steps:
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield _same(f"mtp.{name}.weight", f"mtp/{name}/weight", (D,))
        yield _linear("mtp.fc.weight", "mtp/fc", (2, D), (D,))
        for entry in _layer(c, *c.mtp_layer, "mtp" in layout.fused):
            yield _placed(entry, "mtp.layers.0.", "mtp/layer/", None)


def _layer(c: ModelConfig, mixer: str, sparse: bool, fused: bool) -> Iterator[Entry]:
    D = c.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _same(f"{norm}.weight", f"{norm}/weight", (D,))
    if mixer == LINEAR:
        yield from _delta_net(c)
    else:
        yield from _attention(c)
    if sparse:
        yield from _experts(c, fused)
    else:
        yield from _mlp("mlp.", "mlp/", D, c.intermediate_size)


def _attention(c: ModelConfig) -> Iterator[Entry]:
    D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    there, here = "self_attn.", "self_attn/"
    if c.attention_output_gate:
        parts = {here + "q_proj": (1, H), here + "gate_proj": (1, H)}
        yield _by_heads(there + "q_proj.weight", D, N, parts)
    else:
        yield _linear(there + "q_proj.weight", here + "q_proj", (D,), (N, H))
    for name in ("k_proj", "v_proj"):
        yield _linear(f"{there}{name}.weight", here + name, (D,), (K, H))
    yield _linear(there + "o_proj.weight", here + "o_proj", (N, H), (D,))
    for name in ("q_norm", "k_norm"):
        yield _same(f"{there}{name}.weight", f"{here}{name}/weight", (H,))


def _delta_net(c: ModelConfig) -> Iterator[Entry]:
    D, W = c.hidden_size, c.linear_conv_kernel_dim
    K, H = c.linear_num_key_heads, c.linear_key_head_dim
    N, P = c.linear_num_value_heads, c.linear_value_head_dim
    R = N // K
    there, here = "linear_attn.", "linear_attn/"
    parts = {"q_proj": (1, H), "k_proj": (1, H), "v_proj": (R, P), "z_proj": (R, P)}
    yield _by_heads(there + "in_proj_qkvz.weight", D, K, {here + k: v for k, v in parts.items()})
    yield _by_heads(
        there + "in_proj_ba.weight", D, K, {here + "b_proj": (R,), here + "a_proj": (R,)}
    )
    yield _convolution(
        there + "conv1d.weight",
        W,
        {here + "q_conv": (K, H), here + "k_conv": (K, H), here + "v_conv": (N, P)},
    )
    yield _same(there + "A_log", here + "A_log", (N,))
    yield _same(there + "dt_bias", here + "dt_bias", (N,))
    yield _same(there + "norm.weight", here + "norm/weight", (P,))
    yield _linear(there + "out_proj.weight", here + "out_proj", (N, P), (D,))


def _experts(c: ModelConfig, fused: bool) -> Iterator[Entry]:
    D, E, F = c.hidden_size, c.num_experts, c.moe_intermediate_size
    there, gate_up, down = "mlp.experts.", "mlp/gate_up_proj", "mlp/down_proj"
    yield _linear("mlp.gate.weight", "mlp/router", (D,), (E,))
    if fused:
        yield _whole(
            there + "gate_up_proj",
            gate_up,
            (E, 2 * F, D),
            lambda t: t.reshape(E, 2, F, D).swapaxes(2, 3),
        )
        yield _whole(there + "down_proj", down, (E, D, F), lambda t: t.swapaxes(1, 2))
    else:
        full = slice(None)
        for e in range(E):
            one = slice(e, e + 1)
            for i, name in enumerate(("gate", "up")):
                place = (one, slice(i, i + 1), full, full)
                part = Part(gate_up, place, lambda t: t.T[None, None])
                yield Entry(f"{there}{e}.{name}_proj.weight", (F, D), (part,))
            part = Part(down, (one, full, full), lambda t: t.T[None])
            yield Entry(f"{there}{e}.down_proj.weight", (D, F), (part,))
    if width := c.shared_expert_intermediate_size:
        yield from _mlp("mlp.shared_expert.", "mlp/shared_expert/", D, width)
        yield _linear("mlp.shared_expert_gate.weight", "mlp/shared_expert_gate", (D,), ())


def _mlp(there: str, here: str, D: int, width: int) -> Iterator[Entry]:
    yield _linear(f"{there}gate_proj.weight", f"{here}gate_proj", (D,), (width,))
    yield _linear(f"{there}up_proj.weight", f"{here}up_proj", (D,), (width,))
    yield _linear(f"{there}down_proj.weight", f"{here}down_proj", (width,), (D,))


def _whole(name: str, path: str, shape: tuple[int, ...], view: View) -> Entry:
    """A tensor that is one parameter."""
    return Entry(name, shape, (Part(path, (slice(None),) * view(_empty(shape)).ndim, view),))


def _same(name: str, path: str, shape: tuple[int, ...]) -> Entry:
    return _whole(name, path, shape, lambda t: t)


def _linear(name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Entry:
    """A Linear's [out, in] as ours [inputs..., outputs...]."""
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))
    return _whole(name, path, shape, lambda t: t.T.reshape(*inputs, *outputs))


def _by_heads(name: str, D: int, heads: int, parts: Mapping[str, tuple[int, ...]]) -> Entry:
    """A Linear whose outputs hold several parts head by head; each part is one parameter.

    A part of shape (R, P) in each of K heads belongs to a parameter [D, K · R, P].
    """
    found, row = [], 0
    for head in range(heads):
        for path, part in parts.items():
            rows = slice(row, row + int(np.prod(part)))
            place: Block = (slice(None), slice(head * part[0], (head + 1) * part[0]))
            place += (slice(None),) * (len(part) - 1)
            found.append(Part(path, place, partial(_rows, rows=rows, shape=(D, *part))))
            row = rows.stop
    return Entry(name, (row, D), tuple(found))


def _convolution(name: str, W: int, parts: Mapping[str, tuple[int, ...]]) -> Entry:
    """Channels of several kinds, one kind after the other, each as [W, heads, size]."""
    found, row = [], 0
    for path, shape in parts.items():
        rows = slice(row, row + int(np.prod(shape)))
        found.append(Part(path, (slice(None),) * 3, partial(_rows, rows=rows, shape=(W, *shape))))
        row = rows.stop
    return Entry(name, (row, 1, W), tuple(found))


def _rows(t: np.ndarray, *, rows: slice, shape: tuple[int, ...]) -> np.ndarray:
    """Some of a matrix's rows as ours [inputs, outputs...]."""
    return t[rows].reshape(-1, t.shape[-1]).T.reshape(shape)


def _within(t: np.ndarray, *, view: View, there: Block) -> np.ndarray:
    return view(t)[there]


def _placed(entry: Entry, there: str, here: str, repeat: int | None) -> Entry:
    """Turns a layer's entry into a model's: full names, and the index in the stack if stacked."""

    def placed(part: Part) -> Part:
        if repeat is None:
            return part._replace(path=here + part.path)
        place = (slice(repeat, repeat + 1), *part.place)
        return Part(here + part.path, place, lambda t: part.view(t)[None])

    return Entry(there + entry.name, entry.shape, tuple(map(placed, entry.parts)))


def _bounds(block: Block, shape: tuple[int, ...]) -> np.ndarray:
    """Start and stop of a block along each axis: [axes, 2]."""
    return np.array([s.indices(size)[:2] for s, size in zip(block, shape, strict=True)])


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.uint8(0), shape)
