"""The shape of a model, and the two dialects of a Hugging Face `config.json` that describe it.

`ModelConfig.from_hf` reads both: as released (`rope_theta`, `full_attention_interval`) and as
transformers 5 writes it (`rope_parameters`, `layer_types`).
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from qwen3next_jax.config.checks import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    as_mapping,
    frozen,
    is_positive,
    not_divisible,
    read_json,
    unknown_names,
)

LINEAR, FULL = "linear_attention", "full_attention"

# Keys that the dense `qwen3` lacks, with the values that switch off what they describe.
_QWEN3 = {
    "full_attention_interval": 1,
    "partial_rotary_factor": 1.0,
    "linear_conv_kernel_dim": 0,
    "linear_key_head_dim": 0,
    "linear_value_head_dim": 0,
    "linear_num_key_heads": 0,
    "linear_num_value_heads": 0,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "shared_expert_intermediate_size": 0,
    "zero_centered_norm": False,
    "attention_output_gate": False,
}

_ORIGINAL = "original_max_position_embeddings"

# Keys for which only one value is supported.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Qwen3-Next (or dense Qwen3) model; fields are named as in `config.json`.

    Build it with `from_hf`. Sizes have no defaults, because the class defaults of other libraries
    differ from the released files. `layer_types` is None where `full_attention_interval` = n is
    enough: each n-th layer, counted from one, is full attention, the others are linear.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    full_attention_interval: int
    layer_types: tuple[str, ...] | None = None
    max_position_embeddings: int

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    partial_rotary_factor: float
    # YaRN, as in `config.json`: rope_type, factor, original_max_position_embeddings, ...
    rope_scaling: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    linear_conv_kernel_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 1e-3
    # Layers without experts: those listed, and those whose number `decoder_sparse_step` skips.
    intermediate_size: int
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1

    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    # How many tokens beyond the next the MTP module learns to predict; 0: no such module.
    mtp_steps: int = 0

    # Measures of stability, each of which an ablation can switch off.
    zero_centered_norm: bool = True
    attention_output_gate: bool = True
    router_init: str = "normalized"  # or "normal"

    # Keys of `config.json` that the model does not read, kept to be written back.
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, compare=False)

    # Fields that a Hugging Face `config.json` cannot hold.
    NOT_IN_HF: ClassVar[tuple[str, ...]] = (
        "mtp_steps",
        "zero_centered_norm",
        "attention_output_gate",
        "router_init",
    )

    def __post_init__(self):
        for name in ("layer_types", "mlp_only_layers"):
            if isinstance(getattr(self, name), list):  # which has no hash
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.rope_scaling, Mapping):  # a copy, since the caller may change theirs
            object.__setattr__(self, "rope_scaling", dict(self.rope_scaling) or None)
        problems = list(_model_problems(self))
        if problems:
            raise ValueError("The model cannot be built:\n  " + "\n  ".join(problems))

    @property
    def mixers(self) -> tuple[str, ...]:
        """The token mixer of each layer, "linear_attention" or "full_attention"."""
        if self.layer_types is not None:
            return self.layer_types
        return _interval_pattern(self.num_hidden_layers, self.full_attention_interval)

    @property
    def layers(self) -> tuple[tuple[str, bool], ...]:
        """Each layer's token mixer and whether it has experts."""
        return tuple(
            (
                mixer,
                self.num_experts > 0
                and i not in self.mlp_only_layers
                and (i + 1) % self.decoder_sparse_step == 0,
            )
            for i, mixer in enumerate(self.mixers)
        )

    @property
    def mtp_layer(self) -> tuple[str, bool]:
        """The token mixer of the MTP module's layer, and whether it has experts."""
        return FULL, self.num_experts > 0

    @property
    def all_layers(self) -> tuple[tuple[str, bool], ...]:
        """The `layers` of the decoder, then `mtp_layer` if there is an MTP module."""
        return (*self.layers, *([self.mtp_layer] if self.mtp_steps else []))

    @property
    def group(self) -> tuple[tuple[str, bool], ...]:
        """The smallest block of layers whose repetition is the whole decoder."""
        layers = self.layers
        for period in range(1, len(layers) + 1):
            repeats, rest = divmod(len(layers), period)
            if rest == 0 and layers[:period] * repeats == layers:
                return layers[:period]
        raise AssertionError("a sequence is always its own period")

    @property
    def rotary_dim(self) -> int:
        """How many of a head's `head_dim` entries are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context_length(self) -> int:
        """Most tokens in a sequence: as trained or, with YaRN, the original times the factor."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        scaled = self.rope_scaling["factor"] * self.original_context
        return max(self.max_position_embeddings, int(scaled))

    @property
    def original_context(self) -> int:
        """Most tokens in a sequence without YaRN."""
        original = (self.rope_scaling or {}).get(_ORIGINAL)
        return original or self.max_position_embeddings

    def yarn(self, factor: float) -> dict[str, Any]:
        """The `rope_scaling` that makes the context `factor` times the original."""
        return {
            "rope_type": "yarn",
            "factor": factor,
            _ORIGINAL: self.original_context,
        }

    @classmethod
    def from_hf(cls, source: Any) -> "ModelConfig":
        """Reads a `config.json`: a mapping, the file, or the directory that holds it.

        An object with `to_dict` counts as a mapping: a `ConfigDict`, or a config of transformers.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the model type or a switch is not supported; or keys are missing, or sizes do
            not fit together, in which case all of them are named.
        """
        source = as_mapping(source)
        if isinstance(source, Mapping):
            given = dict(source)
        else:
            path = pathlib.Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist; expected a model's config.json")
            given = read_json(path)
        return cls._from_mapping(given, refuse_unknown=False)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "ModelConfig":
        """Reads a mapping as `from_hf` does, but refuses keys that the model does not read.

        Raises:
          ValueError: as `from_hf`, and names the unknown keys.
        """
        return cls._from_mapping(dict(given), refuse_unknown=True)

    @classmethod
    def _from_mapping(cls, given: dict[str, Any], *, refuse_unknown: bool) -> "ModelConfig":
        _check_model_type(given)
        if fp8_block(given) is not None and not refuse_unknown:
            del given["quantization_config"]  # says how the files are read
        dense = given["model_type"] == "qwen3"
        kept = given.get("extra") or {}  # where a run's config stores keys the model does not read
        if not isinstance(kept, Mapping):
            raise ValueError(f"extra={kept!r} must be a mapping")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        # A null counts as absent, except in keys that are only kept.
        read = fields.keys() | _FIXED.keys() | {"rope_parameters"}
        given = {
            k: v for k, v in given.items() if k != "extra" and (v is not None or k not in read)
        }
        for key, only in _FIXED.items():
            if (value := given.get(key, only)) != only:
                raise ValueError(f"{key}={value!r} is not supported; expected {only!r}")
        if dense:
            _fill_in_what_qwen3_lacks(given)
        _to_released_dialect(given)
        if dense:
            _check_what_qwen3_lacks(given)
        _fill_in_implied(given)

        known = frozen(cls, {k: v for k, v in given.items() if k in fields})
        unknown = {k: v for k, v in given.items() if k not in known}
        problems = [
            f"{key}={value!r} must be of type {kind.__name__}"
            for key, value in known.items()
            if (kind := fields[key].type) in (bool, int, float, str) and type(value) is not kind
        ]
        if refuse_unknown:
            problems += unknown_names("keys in model", unknown, fields)
        if problems:
            raise ValueError("\n".join(problems))
        missing = [
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and name not in known
        ]
        if missing:
            raise ValueError(
                f"The model config lacks {', '.join(missing)}; sizes have no defaults, take them "
                "from the released config.json"
            )
        return cls(**known, extra={**kept, **unknown})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model in the released dialect, kept keys included."""
        given = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in (*self.NOT_IN_HF, "extra")
        }
        if self.model_type == "qwen3":
            given = {k: v for k, v in given.items() if k not in _QWEN3}
        given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
        extra = dict(self.extra)
        if self.rope_scaling is not None:
            extra.pop(_ORIGINAL, None)  # it would precede that of the scaling
        return {**extra, **{k: v for k, v in given.items() if v is not None}}

    def to_dict(self) -> dict[str, Any]:
        """`to_hf` with the fields of `NOT_IN_HF` added; `from_hf` reads it back."""
        return {**self.to_hf(), **{name: getattr(self, name) for name in self.NOT_IN_HF}}


def fp8_block(given: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a scale, by a `config.json`; None: no FP8.

    Raises:
      ValueError: the weights are quantized in another way.
    """
    quantized = given.get("quantization_config")
    if not quantized:
        return None
    method, only = quantized, ""
    if isinstance(quantized, Mapping):
        method, block = quantized.get("quant_method"), quantized.get("weight_block_size")
        if method == "fp8":
            if isinstance(block, list | tuple) and [type(n) for n in block] == [int, int]:
                rows, columns = block
                if rows > 0 and columns > 0:
                    return rows, columns
            only = f" with weight_block_size={block!r}, only with [rows, columns]"
    raise ValueError(
        f"The checkpoint is quantized ({method}), which is not supported{only}; take the same "
        "model in bfloat16 or float32, whose config.json has no quantization_config"
    )


def _check_model_type(given: Mapping[str, Any]) -> None:
    model_type = given.get("model_type")
    if model_type not in ("qwen3_next", "qwen3"):
        ours = "; this is a work directory of ours, which load_checkpoint and convert to-hf read"
        raise ValueError(
            f"model_type={model_type!r} is not supported; expected 'qwen3_next' or 'qwen3'"
            + (ours if "model" in given else "")
        )


def _fill_in_what_qwen3_lacks(given: dict[str, Any]) -> None:
    """Adds to a dense model's config the keys of `_QWEN3`, at the values that switch them off."""
    if given.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not supported; set it to false")
    for key, off in _QWEN3.items():
        given.setdefault(key, off)
    others = sorted(set(_take_layer_types(given)) - {FULL})
    if others:
        raise ValueError(
            f"layer_types holds {', '.join(map(repr, others))}, which is not supported where "
            f"model_type='qwen3'; expected only {FULL!r}, or leave it out"
        )


def _take_layer_types(given: dict[str, Any]) -> tuple[Any, ...]:
    """Removes `layer_types` from a config, and returns them; () if there are none."""
    layer_types = given.pop("layer_types", None)
    if not isinstance(layer_types, list | tuple | None):
        raise ValueError(f"layer_types={layer_types!r} must be a list of the layers' mixers")
    return tuple(layer_types or ())


def _check_what_qwen3_lacks(given: Mapping[str, Any]) -> None:
    for key, only in _QWEN3.items():
        # A qwen3 config.json has no such key, so the value could not be written back.
        if key not in ModelConfig.NOT_IN_HF and given[key] != only:
            raise ValueError(
                f"{key}={given[key]!r} is not supported where model_type='qwen3', a dense model; "
                f"expected {only!r}, or leave it out"
            )


def _to_released_dialect(given: dict[str, Any]) -> None:
    """Replaces, in place, the keys `rope_parameters` and `layer_types` of transformers 5.

    `layer_types` stays only where `full_attention_interval` cannot say the same.
    """
    # Both names mean the same thing. Where both are given, `rope_scaling` counts, as in
    # transformers; `rope_theta` and `partial_rotary_factor` are read from either.
    rope: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        part = given.pop(name, None) or {}
        if not isinstance(part, Mapping):
            raise ValueError(f"{name}={part!r} must be a mapping, with rope_type and factor")
        # A copy, since the caller may change theirs.
        part = {key: value for key, value in part.items() if value is not None}
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in part:
                given[key] = part.pop(key)
        rope = part or rope
    if rope and _rope_type(rope) != "default":
        if rope.get("truncate") is True:  # the default, and all that is supported
            del rope["truncate"]
        if given.get(_ORIGINAL) is not None:  # it precedes that of the scaling, as in transformers
            rope[_ORIGINAL] = given.pop(_ORIGINAL)
        given["rope_scaling"] = rope

    if layer_types := _take_layer_types(given):
        interval = layer_types.index(FULL) + 1 if FULL in layer_types else len(layer_types) + 1
        interval = given.setdefault("full_attention_interval", interval)
        said = _interval_pattern(len(layer_types), interval)
        if layer_types != said or len(said) != given.get("num_hidden_layers"):
            given["layer_types"] = layer_types


def _fill_in_implied(given: dict[str, Any]) -> None:
    """Adds, in place, what other keys imply and some writers leave out."""
    if "mlp_only_layers" in given:
        layers = given["mlp_only_layers"]
        if not isinstance(layers, list | tuple) or any(type(i) is not int for i in layers):
            raise ValueError(f"mlp_only_layers={layers!r} must be a list of layers' numbers")
        given["mlp_only_layers"] = tuple(layers)
    # Released files give intermediate_size even where all layers have experts and none uses it.
    all_sparse = given.get("num_experts") and given.get("decoder_sparse_step", 1) == 1
    if all_sparse and not given.get("mlp_only_layers"):
        given.setdefault("intermediate_size", 0)


def _rope_type(rope: Mapping[str, Any]) -> str | None:
    """The scaling's `rope_type`, which older files call "type"."""
    return rope.get("rope_type", rope.get("type"))


def _interval_pattern(layers: int, interval: int) -> tuple[str, ...]:
    return tuple(LINEAR if (i + 1) % interval else FULL for i in range(layers))


_MOST_LAYERS = 10_000  # each is listed and built


def _model_problems(c: ModelConfig) -> Iterable[str]:
    positive = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "full_attention_interval",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "decoder_sparse_step",
    )
    impossible = [
        f"{name}={getattr(c, name)} must be at least 1" for name in positive if getattr(c, name) < 1
    ]
    for name, value in vars(c).items():
        most = _MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1
        if type(value) is int and value > most:
            impossible.append(f"{name}={value} must be at most {most}")
    if impossible:
        yield from impossible
        return  # what follows divides by sizes, and lists the layers
    if len(c.mixers) != c.num_hidden_layers or set(c.mixers) - {LINEAR, FULL}:
        yield (
            f"layer_types={list(c.mixers)} must name {c.num_hidden_layers} layers, each "
            f"{LINEAR!r} or {FULL!r}"
        )
        return
    for name in ("rope_theta", "rms_norm_eps"):
        if not FLOAT32_TINY <= getattr(c, name) <= FLOAT32_MAX:
            yield f"{name}={getattr(c, name)} must be a positive number, from 1.2e-38 up in float32"
    for name in (
        "initializer_range",
        "router_aux_loss_coef",
        "shared_expert_intermediate_size",
        "num_experts",
    ):
        if not 0 <= getattr(c, name) < math.inf:
            yield f"{name}={getattr(c, name)} must be a number of at least 0"
    if c.num_attention_heads % c.num_key_value_heads:
        yield not_divisible(
            "num_attention_heads",
            c.num_attention_heads,
            "num_key_value_heads",
            c.num_key_value_heads,
        )
    if not 0 < c.partial_rotary_factor <= 1:
        yield f"partial_rotary_factor={c.partial_rotary_factor} must be above 0 and at most 1"
    elif c.rotary_dim % 2 or not c.rotary_dim:
        yield (
            f"partial_rotary_factor={c.partial_rotary_factor} of head_dim={c.head_dim} rotates "
            f"{c.rotary_dim} entries; expected an even number from 2 to {c.head_dim}"
        )
    if c.rope_scaling is not None:
        yield from _yarn_problems(c.rope_scaling, c.rope_theta)
    if outside := [i for i in c.mlp_only_layers if i not in range(c.num_hidden_layers)]:
        yield f"mlp_only_layers has {outside}; expected layers from 0 to {c.num_hidden_layers - 1}"
    if LINEAR in c.mixers:
        yield from _linear_problems(c)
    yield from _feed_forward_problems(c)
    if c.mtp_steps < 0:
        yield f"mtp_steps={c.mtp_steps} must be at least 0 (0: no MTP module)"
    if c.router_init not in ("normalized", "normal"):
        yield f"router_init={c.router_init!r} is unknown; expected 'normalized' or 'normal'"


def _yarn_problems(rope: Mapping[str, Any], theta: float) -> Iterable[str]:
    if not isinstance(rope, Mapping):
        yield f"rope_scaling={rope!r} must be a mapping, with rope_type and factor"
        return
    factor = rope.get("factor")
    longer = is_positive(factor) and factor >= 1
    if _rope_type(rope) != "yarn" or not longer:
        yield (
            f"rope_scaling={dict(rope)} is not supported; give rope_type 'yarn' and "
            "a factor, a number of at least 1"
        )
    original = rope.get(_ORIGINAL)
    if original is not None and (type(original) is not int or original < 1):
        yield (
            f"rope_scaling.original_max_position_embeddings={original!r} must be a whole "
            "number of at least 1"
        )
    if theta <= 1:
        yield f"rope_theta={theta} must be above 1 with YaRN, which divides by its log"
    for key in ("beta_fast", "beta_slow", "attention_factor"):
        value = rope.get(key)
        if value is not None and not is_positive(value):
            yield f"rope_scaling.{key}={value!r} must be a positive number"
    known = ("rope_type", "type", "factor", _ORIGINAL, "beta_fast",
             "beta_slow", "attention_factor")  # fmt: skip
    for key in sorted(rope.keys() - set(known)):
        yield f"rope_scaling.{key} is not supported; expected one of {', '.join(known)}"


def _linear_problems(c: ModelConfig) -> Iterable[str]:
    sizes = (
        "linear_conv_kernel_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
    )
    small = [name for name in sizes if getattr(c, name) < 1]
    if small:
        yield f"{', '.join(small)} must be at least 1 where a layer is {LINEAR}"
    elif c.linear_num_value_heads % c.linear_num_key_heads:
        yield not_divisible(
            "linear_num_value_heads",
            c.linear_num_value_heads,
            "linear_num_key_heads",
            c.linear_num_key_heads,
        )


def _feed_forward_problems(c: ModelConfig) -> Iterable[str]:
    if any(sparse for _, sparse in c.all_layers):
        if not 1 <= c.num_experts_per_tok <= c.num_experts:
            yield (
                f"num_experts_per_tok={c.num_experts_per_tok} must lie between 1 and "
                f"num_experts={c.num_experts}"
            )
        if c.moe_intermediate_size < 1:
            yield f"moe_intermediate_size={c.moe_intermediate_size} must be at least 1"
    if not all(sparse for _, sparse in c.all_layers) and c.intermediate_size < 1:
        yield (
            f"intermediate_size={c.intermediate_size} must be at least 1 for layers without experts"
        )
