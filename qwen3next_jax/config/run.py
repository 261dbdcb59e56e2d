"""A whole training run's config, section by section, and the checks of its values.

The frozen dataclasses are the schema: a config file (`configs/*.py`) fills in every field, and a
key that no field takes is refused with the nearest known names.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from qwen3next_jax.config.checks import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    as_mapping,
    either,
    flatten,
    frozen,
    is_positive,
    not_divisible,
    unknown_names,
)
from qwen3next_jax.config.model import ModelConfig

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

# Names in `evaluation.suites` and of `eval.py --suite`; `evaluation/suites.py` runs them.
SUITES = ("perplexity", "lm_eval", "long_context", "speculation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens."""

    source: str  # one of `SOURCES`, or "mixture"
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
    # Parameters that are drawn from `seed` all the same, by globs of their paths such as "mtp/*".
    new_parameters: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()  # those that no step changes, by such globs
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

    @property
    def micro_batch_size(self) -> int:
        """Rows in a micro-batch, all devices together."""
        return self.global_batch_size // self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Dtypes; gates, norms, router and delta states are float32 throughout."""

    parameters: str  # master copies; "float32" or "bfloat16"
    frozen: str = ""  # of `train.frozen_parameters`; "": as `parameters`
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

    suites: tuple[str, ...] = ()  # during training: some of `SUITES`
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
        given = as_mapping(given)
        names = ("model", *_SECTIONS)
        if not isinstance(given, Mapping):
            raise ValueError(f"The config is a {type(given).__name__}; expected a mapping")
        given = {"evaluation": {}} | {key: as_mapping(value) for key, value in given.items()}
        if wrong := [name for name in names if not isinstance(given.get(name, {}), Mapping)]:
            raise ValueError(f"The config's sections {', '.join(wrong)} must be mappings")
        problems = list(unknown_names("keys in config", given, names))
        sections: dict[str, Any] = {}
        if "model" in given:
            try:
                sections["model"] = ModelConfig.from_dict(given["model"])
            except ValueError as error:
                problems.append(str(error).replace("\n", "\n  "))
        for name, kind in _SECTIONS.items():
            if name in given:
                found = list(_section_problems(name, kind, given[name]))
                problems += found
                if not found:
                    sections[name] = kind(**frozen(kind, given[name]))
        if missing := [name for name in names if name not in given]:
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
        for values in (now, before):
            for key in ("data.tokenizer", "train.initial_checkpoint"):  # which may be directories
                values[key] = str(values.get(key)).rstrip("/")
        before = _BEFORE_THESE_KEYS | before
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


# What keys meant to runs from before there were any such.
_BEFORE_THESE_KEYS = {
    "train.new_parameters": [],
    "train.frozen_parameters": [],
    "precision.frozen": "",
}

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
    yield from unknown_names(f"keys in {name}", given, types)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in given]
    if missing:
        yield f"The config lacks {', '.join(f'{name}.{key}' for key in missing)}"
    for key, value in frozen(kind, given).items():
        expected: Any = typing.get_origin(types.get(key)) or types.get(key, type(value))
        expected = dict if expected is Mapping else expected
        if type(value) is not expected:
            yield f"{name}.{key}={value!r} must be of type {expected.__name__}"
        elif expected is tuple and key in types:
            item, _ = typing.get_args(types[key])
            if any(type(entry) is not item for entry in value):
                yield f"{name}.{key}={value!r} must hold values of type {item.__name__}"


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
    "precision.frozen": ("", "float32", "bfloat16"),
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
_INT32 = (  # counts and sizes on the devices
    "train.num_steps", "train.global_batch_size", "train.sequence_length", "train.loss_chunk",
    "optimizer.warmup_steps", "data.window_rows", "evaluation.batch_size", "evaluation.depths",
    "evaluation.drafts",
)  # fmt: skip
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
    batch = max(train.global_batch_size, 0)  # a negative one is told above, and has no divisors
    if train.gradient_accumulation_steps >= 1 and batch % train.gradient_accumulation_steps:
        yield not_divisible(
            "train.global_batch_size",
            train.global_batch_size,
            "train.gradient_accumulation_steps",
            train.gradient_accumulation_steps,
        )
    yield from _length_problems(c, flat)
    steps = train.profile_steps
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        yield f"train.profile_steps={steps} must be () or (first, last), 1 <= first <= last"
    if train.new_parameters and not train.initial_checkpoint:
        yield (
            f"train.new_parameters={train.new_parameters} needs train.initial_checkpoint; without "
            "one all parameters are new"
        )
    if c.precision.frozen and not train.frozen_parameters:
        yield (
            f"precision.frozen={c.precision.frozen!r} needs train.frozen_parameters; the dtype of "
            "all others is precision.parameters"
        )
    yield from _data_problems(c.data)
    if "speculation" in c.evaluation.suites and not c.model.mtp_steps:
        yield "evaluation.suites has 'speculation', but model.mtp_steps=0: there is no MTP module"
    if batch % max(c.data.num_shards, 1):
        yield not_divisible(
            "train.global_batch_size", train.global_batch_size, "data.num_shards", c.data.num_shards
        )
    for key in ("parameters", "frozen"):
        if getattr(c.precision, key) == "bfloat16" and c.precision.compute == "float32":
            yield f"precision.compute='float32' contradicts {key}='bfloat16'; use bfloat16 for both"
    yield from _mesh_problems(c.mesh)


def _value_problems(c: RunConfig, flat: Mapping[str, Any]) -> Iterable[str]:
    """Values that are wrong by themselves, whatever the other keys say."""
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            yield f"{key}={flat[key]!r} is unknown; expected {either(allowed)}"
    yield from unknown_names("evaluation.suites", c.evaluation.suites, SUITES)
    for key, least in _LEAST.items():
        if not flat[key] >= least:
            yield f"{key}={flat[key]} must be at least {least}"
        elif flat[key] > FLOAT32_MAX:
            yield f"{key}={flat[key]} must be finite in float32"
    for key in _INT32:
        if flat[key] >= 2**31:
            yield f"{key}={flat[key]} must be below 2**31"
    for key in ("train.seed", "evaluation.seed"):
        if not flat[key] < 2**32:
            yield f"{key}={flat[key]} must be below 2**32"
    for key in _SHARES:
        if not 0 <= flat[key] <= 1:
            yield f"{key}={flat[key]} must lie between 0 and 1"
    for key in _BELOW_ONE:
        if not 0 <= flat[key] < 1:
            yield f"{key}={flat[key]} must lie between 0 and 1, below 1"
    if not FLOAT32_TINY <= c.optimizer.eps <= FLOAT32_MAX:
        yield (
            f"optimizer.eps={c.optimizer.eps} must be above 0, from 1.2e-38 up in float32: "
            "rows without gradient divide by it"
        )
    if 0 < c.optimizer.clip_norm < FLOAT32_TINY:
        yield (
            f"optimizer.clip_norm={c.optimizer.clip_norm} is 0 in float32, and every update would "
            "be; give at least 1.2e-38, or 0 for no clipping"
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


def axis_problems(mesh: MeshConfig) -> Iterable[str]:
    """What is wrong with the sizes of a mesh, whatever the number of devices."""
    for axis in (*AXES, "num_slices"):
        if (size := getattr(mesh, axis)) < 1 and size != -1:
            yield f"mesh.{axis}={size} must be at least 1, or -1 for what is left"
    greedy = [f"mesh.{axis}" for axis in AXES if getattr(mesh, axis) == -1]
    if len(greedy) > 1:
        yield (
            f"{' and '.join(greedy)} are all -1; only one axis can take what is left: give the "
            f"others a size, such as {greedy[0]}=1"
        )


def _mesh_problems(mesh: MeshConfig) -> Iterable[str]:
    yield from axis_problems(mesh)
    if mesh.moe_buffer_factor != -1 and not 1 <= mesh.moe_buffer_factor < math.inf:
        yield (
            f"mesh.moe_buffer_factor={mesh.moe_buffer_factor} must be a number from 1, which is "
            "room for an even load, or -1 for whatever comes"
        )


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
            yield f"{where} has unknown keys {unknown}; expected {either(keys)}"
        weight = part.get("weight")
        if not is_positive(weight):
            yield f"{where}.weight={weight!r} must be given, a number above 0"
        if wrong := [key for key in keys[1:] if not isinstance(part.get(key, ""), str)]:
            yield from (f"{where}.{key}={part[key]!r} must be of type str" for key in wrong)
            continue
        source, path = (part.get(key, given[key]) for key in ("source", "path"))
        if source not in SOURCES:
            if name:
                yield f"{where}.source={source!r} is unknown; expected {either(SOURCES)}"
        elif path and not SOURCES[source]:
            yield f"{where}.path={path!r} is not used by source={source!r}; set it to ''"
        elif SOURCES[source] and not path:
            yield f"{where}.source={source!r} needs a path, such as {SOURCES[source]!r}"
