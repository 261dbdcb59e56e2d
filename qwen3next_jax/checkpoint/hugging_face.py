"""Hugging Face tensors to and from ours, as one table.

Each `Entry` of the table ties tensors of a Hugging Face checkpoint to parameters of one of our
layers, with a rearrangement each way that moves numbers and changes none. What the two sides do
differently:
- a Linear's matrix is [out, in] there, and [in, heads..., ...] here;
- `in_proj_qkvz` holds, key head by key head, [q | k | its value heads' v | their z];
  `in_proj_ba` likewise [b | a]; `conv1d` holds all q channels, then all k, then all v;
- with an output gate, `q_proj` holds [query | gate] head by head;
- experts are one tensor each, or fused as [E, 2F, D] and [E, D, F]; both are read;
- layers are apart there, and stacked over the repeats of their group here.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from qwen3next_jax.config import FULL, LINEAR, ModelConfig
from qwen3next_jax.model.decoder import Qwen3Next

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tensors that correspond: names there with shapes, paths here, and the way between."""

    names: dict[str, tuple[int, ...]]
    paths: tuple[str, ...]
    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]
    repeat: int | None = None  # index into the stacked axis of our parameters


def load_tensors(model: Qwen3Next, tensors: Mapping[str, Any]) -> None:
    """Fills a model's parameters, which keep their dtypes.

    Args:
      model: of the config that the tensors belong to.
      tensors: by their names in a Hugging Face checkpoint; experts one by one or fused.

    Raises:
      ValueError: names every missing, unexpected and misshapen tensor; the model is unchanged.
    """
    fused = any(name.endswith("experts.gate_up_proj") for name in tensors)
    table = list(entries(model.config, fused_experts=fused))
    expected = {name: shape for entry in table for name, shape in entry.names.items()}
    problems = [f"missing: {name} {list(s)}" for name, s in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected: {name} {list(tensor.shape)}")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(
                f"wrong shape: {name} is {list(tensor.shape)}, expected {list(expected[name])}"
            )
    if problems:
        raise ValueError("The tensors do not fit the config:\n  " + "\n  ".join(problems))

    params = _by_path(nnx.state(model, nnx.Param))
    filled = {path: np.empty(p.shape, p.dtype) for path, p in params.items()}
    for entry in table:
        ours = entry.to_ours([np.asarray(tensors[name]) for name in entry.names])
        for path, array in zip(entry.paths, ours, strict=True):
            filled[path][() if entry.repeat is None else entry.repeat] = array
    for path, param in params.items():
        param.set_value(jax.numpy.asarray(filled[path]))
    nnx.update(model, nnx.from_flat_state([(_split(path), p) for path, p in params.items()]))


def dump_tensors(
    params: Any, config: ModelConfig, *, fused_experts: bool = False
) -> dict[str, np.ndarray]:
    """Parameters, or anything of their structure such as gradients, under Hugging Face's names."""
    flat = {path: np.asarray(p[...]) for path, p in _by_path(params).items()}
    tensors: dict[str, np.ndarray] = {}
    for entry in entries(config, fused_experts=fused_experts):
        ours = [flat[path][() if entry.repeat is None else entry.repeat] for path in entry.paths]
        tensors |= dict(zip(entry.names, entry.to_theirs(ours), strict=True))
    return tensors


def entries(config: ModelConfig, *, fused_experts: bool = False) -> Iterator[Entry]:
    """The table: every tensor and every parameter of a model, each once."""
    c, D = config, config.hidden_size
    yield _same("model.embed_tokens.weight", "embed_tokens", (c.vocab_size, D))
    yield _same("model.norm.weight", "norm/weight", (D,))
    if not c.tie_word_embeddings:
        yield _linear("lm_head.weight", "lm_head", (D,), (c.vocab_size,))
    period = len(c.group)
    for i, (mixer, sparse) in enumerate(c.layers):
        repeat, place = divmod(i, period)
        for entry in _layer(c, mixer, sparse, fused_experts):
            yield _placed(entry, f"model.layers.{i}.", f"groups/layers/{place}/", repeat)
    if c.mtp_steps:
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield _same(f"mtp.{name}.weight", f"mtp/{name}/weight", (D,))
        yield _linear("mtp.fc.weight", "mtp/fc", (2, D), (D,))
        for entry in _layer(c, FULL, c.num_experts > 0, fused_experts):
            yield _placed(entry, "mtp.layers.0.", "mtp/layer/", None)


def _layer(c: ModelConfig, mixer: str, sparse: bool, fused_experts: bool) -> Iterator[Entry]:
    D = c.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _same(f"{norm}.weight", f"{norm}/weight", (D,))
    if mixer == LINEAR:
        yield from _delta_net(c)
    else:
        yield from _attention(c)
    if sparse:
        yield from _experts(c, fused_experts)
    else:
        yield from _mlp("mlp.", "mlp/", D, c.intermediate_size)


def _attention(c: ModelConfig) -> Iterator[Entry]:
    D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    if c.attention_output_gate:
        yield _grouped(
            "self_attn.q_proj.weight",
            ["self_attn/q_proj", "self_attn/gate_proj"],
            D,
            N,
            [(H,), (H,)],
        )
    else:
        yield _linear("self_attn.q_proj.weight", "self_attn/q_proj", (D,), (N, H))
    for name in ("k_proj", "v_proj"):
        yield _linear(f"self_attn.{name}.weight", f"self_attn/{name}", (D,), (K, H))
    yield _linear("self_attn.o_proj.weight", "self_attn/o_proj", (N, H), (D,))
    for name in ("q_norm", "k_norm"):
        yield _same(f"self_attn.{name}.weight", f"self_attn/{name}/weight", (H,))


def _delta_net(c: ModelConfig) -> Iterator[Entry]:
    D, W = c.hidden_size, c.linear_conv_kernel_dim
    K, H = c.linear_num_key_heads, c.linear_key_head_dim
    N, P = c.linear_num_value_heads, c.linear_value_head_dim
    R = N // K
    there, here = "linear_attn.", "linear_attn/"
    yield _grouped(
        there + "in_proj_qkvz.weight",
        [here + f"{x}_proj" for x in "qkvz"], D, K, [(H,), (H,), (R, P), (R, P)],
    )  # fmt: skip
    yield _grouped(
        there + "in_proj_ba.weight", [here + "b_proj", here + "a_proj"], D, K, [(R, 1), (R, 1)],
        squeeze=True,
    )  # fmt: skip
    heads = [(K, H), (K, H), (N, P)]
    ends = np.cumsum([0] + [n * size for n, size in heads])
    yield Entry(
        {there + "conv1d.weight": (int(ends[-1]), 1, W)},
        tuple(here + f"{x}_conv" for x in "qkv"),
        lambda a: [
            a[0][start:end, 0].T.reshape(W, *shape)
            for start, end, shape in zip(ends, ends[1:], heads, strict=False)
        ],
        lambda a: [np.concatenate([x.reshape(W, -1).T for x in a])[:, None]],
    )
    yield _same(there + "A_log", here + "A_log", (N,))
    yield _same(there + "dt_bias", here + "dt_bias", (N,))
    yield _same(there + "norm.weight", here + "norm/weight", (P,))
    yield _linear(there + "out_proj.weight", here + "out_proj", (N, P), (D,))


def _experts(c: ModelConfig, fused: bool) -> Iterator[Entry]:
    D, E, F = c.hidden_size, c.num_experts, c.moe_intermediate_size
    yield _linear("mlp.gate.weight", "mlp/router", (D,), (E,))
    if fused:
        yield Entry(
            {"mlp.experts.gate_up_proj": (E, 2 * F, D)},
            ("mlp/gate_up_proj",),
            lambda a: [a[0].reshape(E, 2, F, D).transpose(0, 3, 1, 2)],
            lambda a: [a[0].transpose(0, 2, 3, 1).reshape(E, 2 * F, D)],
        )
        yield Entry(
            {"mlp.experts.down_proj": (E, D, F)},
            ("mlp/down_proj",),
            lambda a: [a[0].swapaxes(1, 2)],
            lambda a: [a[0].swapaxes(1, 2)],
        )
    else:
        names = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(E) for p in ("gate", "up")]
        yield Entry(
            dict.fromkeys(names, (F, D)),
            ("mlp/gate_up_proj",),
            lambda a: [np.stack(a).reshape(E, 2, F, D).transpose(0, 3, 1, 2)],
            lambda a: list(a[0].transpose(0, 2, 3, 1).reshape(2 * E, F, D)),
        )
        names = [f"mlp.experts.{e}.down_proj.weight" for e in range(E)]
        yield Entry(
            dict.fromkeys(names, (D, F)),
            ("mlp/down_proj",),
            lambda a: [np.stack(a).swapaxes(1, 2)],
            lambda a: list(a[0].swapaxes(1, 2)),
        )
    if width := c.shared_expert_intermediate_size:
        yield from _mlp("mlp.shared_expert.", "mlp/shared_expert/", D, width)
        yield _linear("mlp.shared_expert_gate.weight", "mlp/shared_expert_gate", (D,), ())


def _mlp(there: str, here: str, D: int, width: int) -> Iterator[Entry]:
    yield _linear(f"{there}gate_proj.weight", f"{here}gate_proj", (D,), (width,))
    yield _linear(f"{there}up_proj.weight", f"{here}up_proj", (D,), (width,))
    yield _linear(f"{there}down_proj.weight", f"{here}down_proj", (width,), (D,))


def _same(name: str, path: str, shape: tuple[int, ...]) -> Entry:
    return Entry({name: shape}, (path,), lambda a: a, lambda a: a)


def _linear(name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Entry:
    """A Linear's [out, in] as ours [inputs..., outputs...]."""
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))
    return Entry(
        {name: shape},
        (path,),
        lambda a: [a[0].T.reshape(*inputs, *outputs)],
        lambda a: [a[0].reshape(shape[::-1]).T],
    )


def _grouped(
    name: str, paths: list[str], D: int, heads: int, parts: list[tuple[int, ...]], squeeze=False
) -> Entry:
    """A Linear whose outputs are, head by head, several parts, as one parameter for each part.

    A part (R, P) of each of K heads becomes [D, K · R, P]; `squeeze` drops P = 1.
    """
    sizes = [int(np.prod(part)) for part in parts]
    splits = list(np.cumsum(sizes)[:-1])

    def to_ours(a: Arrays) -> Arrays:
        pieces = np.split(a[0].reshape(heads, sum(sizes), D), splits, axis=1)
        ours = [
            np.moveaxis(x.reshape(-1, p[-1], D), 2, 0) for x, p in zip(pieces, parts, strict=True)
        ]
        return [x[..., 0] for x in ours] if squeeze else ours

    def to_theirs(a: Arrays) -> Arrays:
        pieces = [
            np.moveaxis(x.reshape(D, -1), 0, 1).reshape(heads, size, D)
            for x, size in zip(a, sizes, strict=True)
        ]
        return [np.concatenate(pieces, axis=1).reshape(-1, D)]

    return Entry({name: (heads * sum(sizes), D)}, tuple(paths), to_ours, to_theirs)


def _placed(entry: Entry, there: str, here: str, repeat: int | None) -> Entry:
    return dataclasses.replace(
        entry,
        names={there + name: shape for name, shape in entry.names.items()},
        paths=tuple(here + path for path in entry.paths),
        repeat=repeat,
    )


def _by_path(params: Any) -> dict[str, nnx.Param]:
    return {"/".join(map(str, path)): p for path, p in nnx.to_flat_state(params)}


def _split(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("/"))
