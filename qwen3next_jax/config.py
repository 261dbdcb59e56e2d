"""The configs: `ModelConfig`, the shape of a model, and `RunConfig`, a whole training run.

These frozen dataclasses are the schema. A config file (`configs/*.py`) fills in every field, a key
that no field takes is refused with the nearest known names, and `ModelConfig.from_hf` reads the two
dialects of a Hugging Face `config.json`: as released (`rope_theta`, `full_attention_interval`) and
as transformers 5 writes it (`rope_parameters`, `layer_types`).
"""

import dataclasses
import difflib
import json
import math
import pathlib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeGuard

import numpy as np

LINEAR, FULL = "linear_attention", "full_attention"

# The mesh axes, in the order of the mesh; `parallel/mesh.py` says what each is for.
AXES = ("data", "fsdp", "expert", "context", "tensor")

# What the backward pass recomputes: nothing; each layer from its input; or each layer except
# attention, whose outputs are saved.
REMAT = ("none", "layer", "layer_but_attention")

# The values of `data.source`, each with an example of a path, or "" where the source takes none.
# `data/sources.py` opens them.
SOURCES = {
    "stdlib": "",
    "text": "/corpus/**/*.txt",
    "jsonl": "/corpus/*.jsonl.zst",
    "parquet": "/corpus/*.parquet",
    "array_record": "/corpus/*.array_record",
    "tfds": "wiki40b/en:1.3.0",
    "synthetic": "",
    "prepared": "/corpus/prepared",
}

_YARN_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)

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

_FLOAT32_TINY, _FLOAT32_MAX = 2.0**-126, 2.0**128 * (1 - 2.0**-24)  # the range of normal numbers

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
        original = (self.rope_scaling or {}).get("original_max_position_embeddings")
        return original or self.max_position_embeddings

    def yarn(self, factor: float) -> dict[str, Any]:
        """The `rope_scaling` that makes the context `factor` times the original."""
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self.original_context,
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
        source = _as_mapping(source)
        if isinstance(source, Mapping):
            given = dict(source)
        else:
            path = pathlib.Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.exists():
                raise FileNotFoundError(f"{path} does not exist; expected a model's config.json")
            try:
                given = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
            if not isinstance(given, Mapping):
                raise ValueError(f"{path} holds a {type(given).__name__}; expected a JSON object")
        return cls._from_mapping(given, refuse_unknown=False)

    @classmethod
    def _from_mapping(cls, given: dict[str, Any], *, refuse_unknown: bool) -> "ModelConfig":
        model_type = given.get("model_type")
        if model_type not in ("qwen3_next", "qwen3"):
            ours = (
                "; this is a work directory of ours, which load_checkpoint and convert to-hf read"
            )
            raise ValueError(
                f"model_type={model_type!r} is not supported; expected 'qwen3_next' or 'qwen3'"
                + (ours if "model" in given else "")
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        kept = given.get("extra") or {}  # where a run's config stores keys the model does not read
        if not isinstance(kept, Mapping):
            raise ValueError(f"extra={kept!r} must be a mapping")
        # A null counts as absent, except in keys that are only kept.
        read = fields.keys() | {"rope_parameters"}
        given = {
            k: v for k, v in given.items() if k != "extra" and (v is not None or k not in read)
        }
        for key, only in _FIXED.items():
            if (value := given.get(key, only)) != only:
                raise ValueError(f"{key}={value!r} is not supported; expected {only!r}")
        if model_type == "qwen3":
            if given.get("use_sliding_window"):
                raise ValueError("use_sliding_window=true is not supported; set it to false")
            given = {**given, **{k: given.get(k, v) for k, v in _QWEN3.items()}}
            given.pop("layer_types", None)
        _to_released_dialect(given)
        if model_type == "qwen3":
            for key, only in _QWEN3.items():
                # A qwen3 config.json has no such key, so the value could not be written back.
                if key not in cls.NOT_IN_HF and given[key] != only:
                    raise ValueError(
                        f"{key}={given[key]!r} is not supported where model_type='qwen3', a dense "
                        f"model; expected {only!r}, or leave it out"
                    )
        _fill_in_implied(given)

        known = {k: v for k, v in given.items() if k in fields}
        unknown = {k: v for k, v in given.items() if k not in known}
        known = _frozen(cls, known)
        problems = [
            f"{key}={value!r} must be of type {kind.__name__}"
            for key, value in known.items()
            if (kind := fields[key].type) in (bool, int, float, str) and type(value) is not kind
        ]
        if refuse_unknown:
            problems += _unknown("keys in model", unknown, fields)
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
        return {**self.extra, **{k: v for k, v in given.items() if v is not None}}

    def to_dict(self) -> dict[str, Any]:
        """`to_hf` with the fields of `NOT_IN_HF` added; `from_hf` reads it back."""
        return {**self.to_hf(), **{name: getattr(self, name) for name in self.NOT_IN_HF}}


def _as_mapping(given: Any) -> Any:
    """Converts a `ConfigDict` or a config of transformers, which are no Mappings, by `to_dict`."""
    return given.to_dict() if hasattr(given, "to_dict") else given


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
        part = dict(part)  # the caller may change theirs
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in part:
                given[key] = part.pop(key)
        rope = part or rope
    if rope and _rope_type(rope) != "default":
        given["rope_scaling"] = rope

    layer_types = tuple(given.pop("layer_types", None) or ())
    if layer_types:
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


def _model_problems(c: ModelConfig) -> Iterable[str]:
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "full_attention_interval",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "decoder_sparse_step",
    ):
        if getattr(c, name) < 1:
            yield f"{name}={getattr(c, name)} must be at least 1"
            return
    if len(c.mixers) != c.num_hidden_layers or set(c.mixers) - {LINEAR, FULL}:
        yield (
            f"layer_types={list(c.mixers)} must name {c.num_hidden_layers} layers, each "
            f"{LINEAR!r} or {FULL!r}"
        )
        return
    for name in ("rope_theta", "rms_norm_eps"):
        if not _FLOAT32_TINY <= getattr(c, name) <= _FLOAT32_MAX:
            yield f"{name}={getattr(c, name)} must be a positive number in float32"
    for name in (
        "initializer_range",
        "router_aux_loss_coef",
        "shared_expert_intermediate_size",
        "num_experts",
    ):
        if not 0 <= getattr(c, name) < math.inf:
            yield f"{name}={getattr(c, name)} must be a number of at least 0"
    if c.num_attention_heads % c.num_key_value_heads:
        yield _not_divisible(
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
    factor = rope.get("factor")
    longer = _is_positive(factor) and factor >= 1
    if _rope_type(rope) != "yarn" or not longer:
        yield (
            f"rope_scaling={dict(rope)} is not supported; give rope_type 'yarn' and "
            "a factor, a number of at least 1"
        )
    original = rope.get("original_max_position_embeddings")
    if original is not None and (type(original) is not int or original < 1):
        yield (
            f"rope_scaling.original_max_position_embeddings={original!r} must be a whole "
            "number of at least 1"
        )
    if theta <= 1:
        yield f"rope_theta={theta} must be above 1 with YaRN, which divides by its log"
    for key in ("beta_fast", "beta_slow", "attention_factor"):
        value = rope.get(key)
        if value is not None and not _is_positive(value):
            yield f"rope_scaling.{key}={value!r} must be a positive number"
    known = ("rope_type", "type", *_YARN_KEYS)
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
        yield _not_divisible(
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


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def _not_divisible(name: str, value: int, divisor_name: str, divisor: int) -> str:
    return (
        f"{name}={value} is not divisible by {divisor_name}={divisor}; choose a divisor, such as "
        + nearest(divisors(value), divisor)
    )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in rising order."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def nearest(choices: Iterable[int], wanted: int) -> str:
    """The two choices nearest to `wanted`, for a message: "2 or 4"."""
    return " or ".join(map(str, sorted(sorted(choices, key=lambda c: abs(c - wanted))[:2])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens."""

    # "stdlib", "text", "jsonl", "parquet", "array_record", "tfds", "synthetic", "prepared" or
    # "mixture"
    source: str
    path: str  # a glob of files; for "tfds" a dataset; "" for sources without
    field: str  # in objects, the field that holds the text or the messages
    split: str  # of "tfds"
    # Parts by name: each a weight, and what differs from source, path, field and split above.
    mixture: Mapping[str, Mapping[str, Any]]
    # A SentencePiece model, a tokenizer.json or "bytes"; "": one is trained and kept.
    tokenizer: str
    chat_template: str  # a Jinja file; "": the one beside the tokenizer
    holdout_fraction: float  # share of the records held out for evaluation, chosen by their names
    on_error: str  # records and files that cannot be used: "raise", or "skip" and count them
    packing: str  # "concatenate", or "best_fit", which keeps documents whole
    too_long: str  # for "best_fit", on documents longer than a row: "error" or "truncate"
    num_shards: int  # virtual shards; divides global_batch_size, the number of hosts divides it
    window_rows: int  # rows of a shard that are packed and shuffled together


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: str  # "adamw" or "muon"
    learning_rate: float  # the peak
    schedule: str  # after the warm-up: "cosine", "wsd" (hold, then decay linearly) or "constant"
    warmup_steps: int
    decay_fraction: float  # "wsd": the last share of the steps, in which the rate falls
    final_fraction: float  # where the schedule ends, as a share of the peak
    weight_decay: float
    b1: float
    b2: float
    eps: float
    clip_norm: float  # of the global gradient norm; 0: no clipping


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, loss terms and schedule of a run."""

    num_steps: int
    # Weights to begin with: a Hugging Face directory, a work directory or one of its step folders;
    # "": drawn from `seed`. Not read when a run resumes.
    initial_checkpoint: str
    global_batch_size: int  # rows in a step, all micro-batches and devices together
    sequence_length: int  # tokens in a row
    gradient_accumulation_steps: int  # micro-batches a step
    seed: int
    mtp_loss_weight: float
    router_z_loss_weight: float
    balance_scope: str  # over which tokens expert loads are averaged: see `training/loss.py`
    loss_chunk: int  # positions of a row whose logits exist at a time
    remat: str  # what the backward pass recomputes, one of `REMAT`
    log_every: int
    diagnostics: bool = True  # statistics of layers and updates: see `training/diagnostics.py`
    eval_every: int  # 0: only at the end
    checkpoint_every: int  # 0: only at the end
    keep_checkpoints: int  # how many of the newest stay
    keep_best: int = 0  # how many with the lowest evaluation cross-entropy also stay
    sample_tokens: int  # length of the texts written as samples; 0: none
    sample_every: int = 0  # 0: only at the end
    sample_prompts: tuple[str, ...] = ("",)  # each is continued; "" is the start of a document
    profile_steps: tuple[int, ...]  # first and last step of a profiler trace; (): none


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Dtypes; gates, norms, router and delta states are float32 throughout."""

    parameters: str  # master copies; "float32" or "bfloat16"
    compute: str  # activations and matrix products; "float32" or "bfloat16"
    optimizer: str  # first moments; "float32" or "bfloat16"
    matmul: str  # passes of float32 products: "default", "high" or "highest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes (`parallel/mesh.py` says what each is for); -1 takes what is left."""

    data: int
    fsdp: int
    expert: int = 1
    context: int = 1
    tensor: int = 1
    num_slices: int = 1  # TPU slices, joined by a slower network; -1: as many as the devices span
    # Rows that a device can receive for its experts, as a multiple of an even load; -1: room for
    # the largest possible load, so that nothing is dropped.
    moe_buffer_factor: float = -1.0
    on_overflow: str = "error"  # rows beyond the buffer: "error" ends the run, "drop" counts them
    # Largest share of a device's training state that may be replicas of other devices' arrays.
    max_replicated: float = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Options of the suites in `evaluation/`, for `eval.py` and during training."""

    # During training: "perplexity", "lm_eval", "long_context", "speculation".
    suites: tuple[str, ...] = ()
    every: int = 0  # steps of training; 0: only at the end
    batch_size: int = 0  # rows at a time; 0: as many as have 8192 tokens a device
    # Documents ("perplexity", of each task of "lm_eval"), prompts of each domain ("speculation"),
    # or questions of each cell ("long_context"); 0: all, all, 16, 4.
    limit: int = 0
    length: int = 0  # "perplexity": tokens of a document that are read at once; 0: the context
    tasks: tuple[str, ...] = ()  # "lm_eval": names of the harness's tasks, or YAML files
    include_path: str = ""  # "lm_eval": a directory with more of them
    num_fewshot: int = -1  # "lm_eval": examples before a question; -1: as the task says
    confirm_run_unsafe_code: bool = False  # "lm_eval": run what the model writes, if a task does
    long_context_tasks: tuple[str, ...] = ()  # (): all
    lengths: tuple[int, ...] = ()  # "long_context"; (): powers of two up to the context
    depths: int = 5  # "long_context"
    drafts: int = 2  # "speculation": tokens drafted at a time
    chat: bool = False  # "lm_eval", "long_context": ask through the chat template
    seed: int = 1234


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a training run. Build it with `from_dict`, from a config file's nested mapping."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    precision: PrecisionConfig
    mesh: MeshConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    # Keys that may change when a run resumes from its checkpoint. The learning rate's schedule is a
    # function of the step, so a longer run follows the longer schedule from there on.
    MUTABLE: ClassVar[tuple[str, ...]] = (
        "train.num_steps", "train.log_every", "train.eval_every", "train.checkpoint_every",
        "train.keep_checkpoints", "train.keep_best", "train.sample_tokens",
        "train.diagnostics", "train.sample_every", "train.sample_prompts", "train.profile_steps",
        "train.remat", "train.loss_chunk", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.context",
        "mesh.tensor", "mesh.num_slices", "mesh.moe_buffer_factor", "mesh.on_overflow",
        "mesh.max_replicated",
        *(f"evaluation.{field.name}" for field in dataclasses.fields(EvaluationConfig)),
    )  # fmt: skip

    @classmethod
    def from_dict(cls, given: Any) -> "RunConfig":
        """Checks and freezes a nested mapping, or a `ConfigDict` of `ml_collections`.

        Raises:
          ValueError: names every unknown or missing key, impossible size and contradiction.
        """
        given = _as_mapping(given)
        names = ("model", *_SECTIONS)
        if not isinstance(given, Mapping):
            raise ValueError(f"The config is a {type(given).__name__}; expected a mapping")
        wrong = [
            name for name in names if not isinstance(_as_mapping(given.get(name, {})), Mapping)
        ]
        if wrong:
            raise ValueError(f"The config's sections {', '.join(wrong)} must be mappings")
        problems = list(_unknown("keys in config", given, names))
        sections: dict[str, Any] = {}
        if "model" in given:
            try:
                sections["model"] = ModelConfig._from_mapping(
                    dict(given["model"]), refuse_unknown=True
                )
            except ValueError as error:
                problems.append(str(error).replace("\n", "\n  "))
        for name, kind in _SECTIONS.items():
            if name in given or name == "evaluation":
                found = list(_section_problems(name, kind, given.get(name, {})))
                problems += found
                if not found:
                    sections[name] = kind(**_frozen(kind, given.get(name, {})))
        missing = [name for name in names if name not in given and name != "evaluation"]
        if missing:
            problems.append(f"The config lacks the sections {', '.join(missing)}")
        if not problems:
            config = cls(**sections)
            problems += _run_problems(config)
        if problems:
            raise ValueError("The run cannot start:\n  " + "\n  ".join(problems))
        return config

    def to_dict(self) -> dict[str, Any]:
        """The nested mapping that `from_dict` reads; it holds only what JSON can."""
        extra = self.model.extra  # under a key of its own: `from_dict` refuses unknown keys
        model = {**dataclasses.replace(self.model, extra={}).to_dict(), "extra": extra}
        return json.loads(json.dumps({**dataclasses.asdict(self), "model": model}))

    def check_resumable_from(self, old: Mapping[str, Any]) -> None:
        """Raises a ValueError that names the keys whose change since `old` prevents resuming."""
        now, before = flatten(self.to_dict()), flatten(old)
        # A stricter setting may be relaxed: the records read so far would be read the same way.
        if before.get("data.on_error") == "raise":
            for key, strict in (("data.on_error", "raise"), ("data.too_long", "error")):
                if before.get(key) == strict:
                    before[key] = now[key]
        changed = [
            f"{key}: was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(now.keys() | before.keys())
            if now.get(key) != before.get(key) and key not in self.MUTABLE
        ]
        if changed:
            raise ValueError(
                "This work directory holds a run with another config; restore these values or "
                "choose another --workdir:\n  " + "\n  ".join(changed)
            )


_SECTIONS = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "precision": PrecisionConfig,
    "mesh": MeshConfig,
    "evaluation": EvaluationConfig,
}


def _section_problems(name: str, kind: type, given: Mapping[str, Any]) -> Iterable[str]:
    fields = dataclasses.fields(kind)
    types = {field.name: field.type for field in fields}
    yield from _unknown(f"keys in {name}", given, types)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in given]
    if missing:
        yield f"The config lacks {', '.join(f'{name}.{key}' for key in missing)}"
    for key, value in _frozen(kind, given).items():
        expected: Any = typing.get_origin(types.get(key)) or types.get(key, type(value))
        expected = dict if expected is Mapping else expected
        if type(value) is not expected:
            yield f"{name}.{key}={value!r} must be of type {expected.__name__}"
        elif expected is tuple and key in types:
            item, _ = typing.get_args(types[key])
            if any(type(entry) is not item for entry in value):
                yield f"{name}.{key}={value!r} must hold values of type {item.__name__}"


def _frozen(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Converts values to their fields' types: lists to tuples, NumPy scalars and ints to floats."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}

    def freeze(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(freeze("", item) for item in value)
        if isinstance(value, np.generic):  # such as one from np.geomspace
            value = value.item()
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and types.get(key) is float else value

    return {key: freeze(key, value) for key, value in given.items()}


# Keys that take one of a few values.
_CHOICES = {
    "data.source": (*SOURCES, "mixture"),
    "data.on_error": ("raise", "skip"),
    "data.packing": ("concatenate", "best_fit"),
    "data.too_long": ("error", "truncate"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "train.balance_scope": ("global", "micro_batch", "sequence"),
    "train.remat": REMAT,
    "mesh.on_overflow": ("error", "drop"),
    "precision.parameters": ("float32", "bfloat16"),
    "precision.compute": ("float32", "bfloat16"),
    "precision.optimizer": ("float32", "bfloat16"),
    "precision.matmul": ("default", "high", "highest"),
}
# The smallest value of each of these keys.
_LEAST = {
    "train.num_steps": 1, "train.global_batch_size": 1, "train.sequence_length": 2,
    "train.gradient_accumulation_steps": 1, "train.loss_chunk": 1, "train.log_every": 1,
    "train.eval_every": 0, "train.checkpoint_every": 0, "train.keep_checkpoints": 1,
    "train.keep_best": 0, "train.sample_tokens": 0, "train.sample_every": 0,
    "train.mtp_loss_weight": 0, "train.router_z_loss_weight": 0, "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0,
    "data.num_shards": 1, "data.window_rows": 1, "evaluation.every": 0,
    "evaluation.batch_size": 0, "evaluation.limit": 0, "evaluation.length": 0,
    "evaluation.num_fewshot": -1, "evaluation.depths": 1, "evaluation.drafts": 1,
    "evaluation.seed": 0, "train.seed": 0,
}  # fmt: skip
_SHARES = (  # each in [0, 1]
    "data.holdout_fraction",
    "optimizer.decay_fraction",
    "optimizer.final_fraction",
    "mesh.max_replicated",
)
_BELOW_ONE = ("optimizer.b1", "optimizer.b2")


def _run_problems(c: RunConfig) -> Iterable[str]:
    flat = flatten({name: dataclasses.asdict(getattr(c, name)) for name in _SECTIONS})
    yield from _value_problems(c, flat)
    train = c.train
    if train.gradient_accumulation_steps >= 1 and (
        train.global_batch_size % train.gradient_accumulation_steps
    ):
        yield _not_divisible(
            "train.global_batch_size",
            train.global_batch_size,
            "train.gradient_accumulation_steps",
            train.gradient_accumulation_steps,
        )
    yield from _length_problems(c, flat)
    steps = train.profile_steps
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        yield f"train.profile_steps={steps} must be () or (first, last), 1 <= first <= last"
    yield from _data_problems(c.data)
    if "speculation" in c.evaluation.suites and not c.model.mtp_steps:
        yield "evaluation.suites has 'speculation', but model.mtp_steps=0: there is no MTP module"
    if train.global_batch_size % max(c.data.num_shards, 1):
        yield _not_divisible(
            "train.global_batch_size", train.global_batch_size, "data.num_shards", c.data.num_shards
        )
    if c.precision.parameters == "bfloat16" and c.precision.compute == "float32":
        yield "precision.compute='float32' contradicts parameters='bfloat16'; use bfloat16 for both"
    yield from _mesh_problems(c.mesh)


def _value_problems(c: RunConfig, flat: Mapping[str, Any]) -> Iterable[str]:
    """Values that are wrong by themselves, whatever the other keys say."""
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            yield f"{key}={flat[key]!r} is unknown; expected {_either(allowed)}"
    for key, least in _LEAST.items():
        if not flat[key] >= least:
            yield f"{key}={flat[key]} must be at least {least}"
        elif flat[key] > _FLOAT32_MAX:
            yield f"{key}={flat[key]} must be finite in float32"
    for key in ("train.seed", "evaluation.seed"):
        if not flat[key] < 2**32:
            yield f"{key}={flat[key]} must be below 2**32"
    for key in _SHARES:
        if not 0 <= flat[key] <= 1:
            yield f"{key}={flat[key]} must lie between 0 and 1"
    for key in _BELOW_ONE:
        if not 0 <= flat[key] < 1:
            yield f"{key}={flat[key]} must lie between 0 and 1, below 1"
    if not _FLOAT32_TINY <= c.optimizer.eps <= _FLOAT32_MAX:
        yield (
            f"optimizer.eps={c.optimizer.eps} must be above 0 and finite in float32: rows without "
            "gradient divide by it"
        )


def _length_problems(c: RunConfig, flat: Mapping[str, Any]) -> Iterable[str]:
    """Lengths beyond the model's context."""
    train = c.train
    if train.sequence_length > c.model.context_length:
        yield (
            f"train.sequence_length={train.sequence_length} exceeds the model's context of "
            f"{c.model.context_length} tokens; shorten the rows, or {_longer(c.model, train)}"
        )
    if c.model.mtp_steps >= train.sequence_length:
        yield (
            f"model.mtp_steps={c.model.mtp_steps} must be below "
            f"train.sequence_length={train.sequence_length}, for rows to have tokens so far ahead"
        )
    for key in ("train.sample_tokens", "evaluation.length"):
        if flat[key] > c.model.context_length:
            yield (
                f"{key}={flat[key]} exceeds the model's context of {c.model.context_length} tokens"
            )
    if any(length < 1 for length in c.evaluation.lengths):
        yield f"evaluation.lengths={c.evaluation.lengths} must be at least 1"
    longest = max(c.evaluation.lengths, default=0)
    if c.model.rope_scaling is not None and longest > c.model.context_length:
        yield (
            f"evaluation.lengths has {longest}, which exceeds the model's context of "
            f"{c.model.context_length} tokens; raise model.rope_scaling.factor or ask for less"
        )


def _mesh_problems(mesh: MeshConfig) -> Iterable[str]:
    greedy = [f"mesh.{axis}" for axis in AXES if getattr(mesh, axis) == -1]
    if len(greedy) > 1:
        yield f"{' and '.join(greedy)} are all -1; only one axis can take what is left"
    if mesh.moe_buffer_factor != -1 and not 1 <= mesh.moe_buffer_factor < math.inf:
        yield (
            f"mesh.moe_buffer_factor={mesh.moe_buffer_factor} must be a number from 1, which is "
            "room for an even load, or -1 for whatever comes"
        )
    for axis in (*AXES, "num_slices"):
        if (size := getattr(mesh, axis)) < 1 and size != -1:
            yield f"mesh.{axis}={size} must be at least 1, or -1 for what is left"


def _longer(model: ModelConfig, train: TrainConfig) -> str:
    """How to make a model's context as long as the rows, for a message."""
    if model.rope_scaling is not None:
        return "raise model.rope_scaling.factor"
    yarn = model.yarn(float(-(-train.sequence_length // model.original_context)))
    return f"lengthen it by YaRN: --config.model.rope_scaling='{json.dumps(yarn)}'"


def _data_problems(c: DataConfig) -> Iterable[str]:
    if (c.source == "mixture") != bool(c.mixture):
        yield (
            f"data.source={c.source!r} with {len(c.mixture)} parts in data.mixture; a mixture has "
            "data.source='mixture' and at least one part"
        )
    given = {"source": c.source, "path": c.path}
    keys = ("weight", "source", "path", "field", "split")
    for name, part in c.mixture.items() if c.mixture else [("", {"weight": 1.0})]:
        where = f"data.mixture.{name}" if name else "data"
        if not isinstance(part, Mapping):
            yield f"{where}={part!r} must be a mapping, with a weight and what differs"
            continue
        if unknown := sorted(part.keys() - set(keys)):
            yield f"{where} has unknown keys {unknown}; expected {_either(keys)}"
        weight = part.get("weight")
        if not _is_positive(weight):
            yield f"{where}.weight={weight!r} must be given, a number above 0"
        if wrong := [key for key in keys[1:] if not isinstance(part.get(key, ""), str)]:
            yield from (f"{where}.{key}={part[key]!r} must be of type str" for key in wrong)
            continue
        source, path = (part.get(key, given[key]) for key in ("source", "path"))
        if source not in SOURCES:
            if name:
                yield f"{where}.source={source!r} is unknown; expected {_either(SOURCES)}"
        elif path and not SOURCES[source]:
            yield f"{where}.path={path!r} is not used by source={source!r}; set it to ''"
        elif SOURCES[source] and not path:
            yield f"{where}.source={source!r} needs a path, such as {SOURCES[source]!r}"


def require_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises a ValueError that lists the unknown names, each with the nearest known ones."""
    for problem in _unknown(what, given, known):
        raise ValueError(problem)


def _unknown(what: str, given: Iterable[str], known: Iterable[str]) -> Iterable[str]:
    """Yields one message that lists all unknown names, if there are any."""
    known, complaints = list(known), []
    for name in given:
        if name in known:
            continue
        if near := difflib.get_close_matches(name, known, n=3, cutoff=0.5):
            hint = f"did you mean {_either(near)}?"
        elif len(known) <= 10:
            hint = "expected one of " + ", ".join(known)
        else:
            hint = f"nothing like it among {len(known)} known ones"
        complaints.append(f"{name!r} ({hint})")
    if complaints:
        yield f"Unknown {what}: {', '.join(complaints)}"


def _either(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted key; an empty mapping contributes none."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
