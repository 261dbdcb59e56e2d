"""What a model and a run cost by arithmetic alone: parameters, operations, memory, communication.

Parameters and state are counted on the shapes that training itself allocates. Operations count
matrix products only, a multiply-add as 2: norms, gates and softmaxes are below a percent. The rest
of a step's memory and its communication are modelled on what the compiled step holds and sends;
`tpu.py` asks the compiler itself.

Letters are those of docs/architecture.md; s is the length of a sequence.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from qwen3next_jax.config import FULL, LINEAR, ModelConfig, RunConfig
from qwen3next_jax.ops.delta_rule import CHUNK
from qwen3next_jax.parallel.mesh import ROWS, parameter_shardings
from qwen3next_jax.parallel.names import is_variable, matching_names, named_leaves
from qwen3next_jax.plan.chips import Chip

_EFFICIENCY = 0.3  # of the chip's peak, that products are taken to reach

# Parts of the model, by what their parameters' names contain; the first match counts. Experts are
# distinguished from other feed-forwards by their axes.
_PARTS = (
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("mtp/", "MTP"),
    ("shared_expert", "shared experts"),
    ("mlp/router", "routers"),
    ("mlp/", "feed-forward"),
    ("linear_attn", "DeltaNet"),
    ("self_attn", "attention"),
    ("norm", "norms"),
)

# Dense Qwen3-32B, to which the authors of Qwen3-Next compare; the model of configs/qwen3_32b.py,
# which an installed package lacks.
YARDSTICK = dict(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=5120,
    num_hidden_layers=64,
    max_position_embeddings=40960,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=1e6,
    intermediate_size=25600,
    tie_word_embeddings=False,
)


def parameters(params: nnx.State) -> dict[str, int]:
    """Counts parameters, or shapes of them, by part."""
    parts: Counter[str] = Counter()
    for name, x in named_leaves(params, is_variable):
        part = next((part for pattern, part in _PARTS if pattern in name), "other")
        if part == "feed-forward" and _of_experts(x):
            part = "experts"
        parts[part] += math.prod(x.shape)
    return dict(parts)


def active_parameters(params: nnx.State, config: ModelConfig) -> int:
    """Parameters that one token uses: of the experts its own, of the embedding one row."""
    total = 0
    for name, x in named_leaves(params, is_variable):
        size = math.prod(x.shape)
        if "embed_tokens" in name and not config.tie_word_embeddings:
            size = config.hidden_size
        elif _of_experts(x):
            size = size * config.num_experts_per_tok // config.num_experts
        total += size
    return total


def _of_experts(param: nnx.Variable) -> bool:
    return "experts" in param.axes  # names do not tell: dense layers also have a `down_proj`


def forward_flops(
    config: ModelConfig, s: int, *, seen: float = 0.5, mtp: bool = True
) -> dict[str, float]:
    """Operations per token of the forward pass, by part.

    Args:
      config: the model's config.
      s: tokens in a sequence.
      seen: share of the s × s scores that are computed: a half for causal attention.
      mtp: whether to include the MTP module, unrolled for all of its steps.
    """
    D, V = config.hidden_size, config.vocab_size
    parts: dict[str, float] = defaultdict(float)
    for mixer, sparse in config.layers:
        if mixer == LINEAR:
            parts["DeltaNet projections"] += _delta_projections(config)
            parts["delta rule"] += _delta_rule(config)
        else:
            parts["attention projections"] += _attention_projections(config)
            parts["attention scores"] += seen * _scores(config, s)
        for name, flops in _feed_forward(config, sparse).items():
            parts[name] += flops
    parts["head"] += 2 * D * V
    if mtp and config.mtp_steps:
        layer: float = _attention_projections(config) + seen * _scores(config, s)
        layer += sum(_feed_forward(config, config.mtp_layer[1]).values())
        parts["MTP"] += config.mtp_steps * (2 * 2 * D * D + layer + 2 * D * V)
    return dict(parts)


def train_flops(config: ModelConfig, s: int, params: Sequence["Weight"] = ()) -> float:
    """Operations per token of training, as MFU counts them: three times the forward pass.

    Args:
      config: the model's config.
      s: tokens in a sequence.
      params: the model's parameters, of which some are frozen; (): all are trained.
    """
    return executed_flops(config, s, remat="none", params=params)


def executed_flops(
    config: ModelConfig,
    s: int,
    *,
    remat: str,
    seen: float = 0.5,
    params: Sequence["Weight"] = (),
) -> float:
    """Operations per token that a step executes, which include recomputation of the layers.

    Head and MTP module are not recomputed: the cross-entropy computes its gradients in the forward
    pass, and the MTP module is not rematerialised.

    Args:
      config: the model's config.
      s: tokens in a sequence.
      remat: `train.remat`.
      seen: share of the s × s scores that are computed.
      params: the model's parameters, of which some are frozen; (): all are trained.
    """
    flops = 3 * sum(forward_flops(config, s, seen=seen).values())
    flops -= _spared_flops(config, params, s, seen=seen)
    if remat != "none" and not _layers_are_frozen(params):
        layers = forward_flops(config, s, seen=seen, mtp=False)
        flops += sum(layers.values()) - layers["head"]
        if remat == "layer_but_attention":
            flops -= layers.get("attention scores", 0)
        # The last product of a feed-forward or expert is not recomputed: its result is not needed
        # in the backward pass.
        dense = sum(not sparse for _, sparse in config.layers)
        hidden = dense * config.intermediate_size
        hidden += (len(config.layers) - dense) * (
            config.num_experts_per_tok * config.moe_intermediate_size
        )
        flops -= 2 * config.hidden_size * hidden
    return flops


def _delta_projections(c: ModelConfig) -> int:
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    conv = 2 * c.linear_conv_kernel_dim * (2 * keys + values)
    # q and k; v, z and the output projection; two gates a head.
    return 2 * c.hidden_size * (2 * keys + 3 * values + 2 * c.linear_num_value_heads) + conv


def _delta_rule(c: ModelConfig) -> int:
    """Four products of a state and a vector: decay, read, write, query. Chunks cost about that."""
    return 8 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim


def _attention_projections(c: ModelConfig) -> int:
    queries = c.num_attention_heads * c.head_dim * (3 if c.attention_output_gate else 2)
    return 2 * c.hidden_size * (queries + 2 * c.num_key_value_heads * c.head_dim)


def _scores(c: ModelConfig, s: int) -> int:
    return 4 * c.num_attention_heads * c.head_dim * s


def _feed_forward(c: ModelConfig, sparse: bool) -> dict[str, int]:
    D = c.hidden_size
    if not sparse:
        return {"feed-forward": 6 * D * c.intermediate_size}
    return {
        "routers": 2 * D * c.num_experts,
        "experts": 6 * D * c.moe_intermediate_size * c.num_experts_per_tok,
        "shared experts": (6 * c.shared_expert_intermediate_size + 2) * D
        if c.shared_expert_intermediate_size
        else 0,
    }


# Memory and communication, per device.


class Weight(NamedTuple):
    """A parameter on a mesh."""

    name: str
    size: int  # entries
    own: int  # entries of a device's shard
    width: int  # bytes of an entry
    experts: bool  # whether it holds experts' matrices
    frozen: bool  # whether it has no gradient


def weights(params: nnx.State, mesh: Any, frozen: Iterable[str] = ()) -> list[Weight]:
    """A model's parameters as sharded on a mesh.

    Args:
      params: the parameters, or their shapes.
      mesh: the mesh, which may be an `AbstractMesh`.
      frozen: `train.frozen_parameters`.
    """
    places = dict(named_leaves(parameter_shardings(params, mesh)))
    kept = matching_names(places, frozen, key="train.frozen_parameters")
    return [
        Weight(
            name=name,
            size=math.prod(x.shape),
            own=math.prod(places[name].shard_shape(x.shape)),
            width=x.dtype.itemsize,
            experts=_of_experts(x),
            frozen=name in kept,
        )
        for name, x in named_leaves(params, is_variable)
    ]


def _spared_flops(config: ModelConfig, params: Sequence[Weight], s: int, *, seen: float) -> float:
    """Operations per token that a step does not execute since parameters are frozen.

    They are the gradients of frozen matrices and, if all layers are frozen, of their activations,
    but not what is recomputed for these. The gradients of only some of several equal
    neighbouring layers are counted as spared, though with `remat` they are computed all the same.
    """
    heads = 1 + config.mtp_steps
    uses = {"lm_head": heads, "embed_tokens": heads if config.tie_word_embeddings else 0}
    spared = 0.0
    if _layers_are_frozen(params):
        layers = forward_flops(config, s, seen=seen, mtp=False)
        spared = 2 * (sum(layers.values()) - layers["head"])
        params = [p for p in params if not _stacked(p)]
    for p in params:
        if p.frozen:
            times = uses.get(p.name, config.mtp_steps if p.name.startswith("mtp/") else 1)
            share = config.num_experts_per_tok / config.num_experts if p.experts else 1
            spared += 2 * p.size * times * share
    return spared


def _tokens_per_device(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """Tokens of a micro-batch on a device; devices along `tensor` hold the same tokens."""
    train = config.train
    ways = math.prod(sizes[axis] for axis in ROWS) * sizes["context"]
    return max(1, train.micro_batch_size * train.sequence_length // ways)


def memory(
    config: RunConfig,
    params: Sequence[Weight],
    sizes: Mapping[str, int],
    *,
    optimizer_width: float,
) -> dict[str, float]:
    """Bytes that a device holds at the peak of a step, by kind.

    The peak is in the backward pass of the last layer, when all layers' inputs are saved, or at the
    head, or in the update: what the largest of the three holds is returned.

    Args:
      config: the run's config.
      params: the run's parameters on the mesh.
      sizes: sizes of the mesh axes.
      optimizer_width: bytes of optimizer state per parameter that is not frozen.
    """
    c, tokens = config.model, _tokens_per_device(config, sizes)
    width = jnp.dtype(config.precision.compute).itemsize
    trained = sum(p.own for p in params if not p.frozen)
    gradients = 4.0 * trained
    # With several micro-batches, the sum of gradients so far exists besides the current ones.
    summed = gradients if config.train.gradient_accumulation_steps > 1 else 0.0
    vocabulary = c.vocab_size * c.hidden_size / sizes["tensor"]

    layers = [_activations(config, mixer, sparse, tokens, sizes) for mixer, sparse in c.layers]
    kept: float
    if config.train.remat != "none":
        kept = c.num_hidden_layers * tokens * c.hidden_size * width
        if config.train.remat == "layer_but_attention":
            full = c.mixers.count(FULL)
            kept += full * tokens * c.num_attention_heads * c.head_dim * width / sizes["tensor"]
    else:
        kept = sum(layers)
    kept *= not _layers_are_frozen(params)
    in_a_pass = {
        # Copies of the weights in the compute dtype, or beside those of equal layers.
        "parameters to multiply with": float(
            sum(p.own * width for p in params if width < p.width or _restacked(config, p))
        ),
        "kept activations": float(kept),
    }

    # The backward pass of a layer, with its gathered weights and their gradients.
    gathered = sum(
        (width + (0 if p.frozen else 4)) * p.size / _ways_in_use(p, sizes)
        for p in params
        if _stacked(p)
    )
    layer = in_a_pass | {
        "gradients": gradients + summed,
        "a layer": max(layers) + gathered / c.num_hidden_layers,
    }
    # At the head no gradients exist yet except the head's own, not yet scattered, and with MTP a
    # second one; with them are logits and their gradients in float32.
    rows = max(1, tokens * sizes["context"] // config.train.sequence_length)
    chunk = min(config.train.loss_chunk, config.train.sequence_length // sizes["context"])
    logits = rows * chunk * 8 * c.vocab_size / sizes["tensor"]
    of_head = "embed_tokens" if c.tie_word_embeddings else "lm_head"
    trained_head = not any(p.frozen and p.name == of_head for p in params)
    head = in_a_pass | {
        "gradients": summed,
        "the head": (2 * 4 * (1 + bool(c.mtp_steps)) * trained_head + width) * vocabulary + logits,
    }
    # The update is counted as three arrays of the gradients' size. Activations and copies are freed
    # by then. The embedding's gradient is not scattered either.
    update = {"gradients": gradients, "the update": max(2 * gradients, 2 * 4 * vocabulary)}
    phases: list[dict[str, float]] = [layer, head, update]
    return {
        "parameters": float(sum(p.own * p.width for p in params)),
        "optimizer state": trained * optimizer_width,
        **max(phases, key=lambda phase: sum(phase.values())),
    }


def _activations(
    config: RunConfig, mixer: str, sparse: bool, tokens: int, sizes: Mapping[str, int]
) -> float:
    """Bytes that a layer's forward pass saves for the backward pass on a TPU."""
    c, width = config.model, jnp.dtype(config.precision.compute).itemsize
    mixed: float
    if mixer == LINEAR:
        K, H = c.linear_num_key_heads, c.linear_key_head_dim
        N, P = c.linear_num_value_heads, c.linear_value_head_dim
        states = N * (CHUNK + H * P / CHUNK)  # per token a row of an inverse; per chunk a state
        # Queries, keys and values twice, as projected and as inputs of the kernel; the gate, its
        # product with the outputs, and the outputs twice.
        mixed = width * (2 * (2 * K * H + N * P) + 4 * N * P + states)
    else:
        mixed = width * c.head_dim * (5 * c.num_attention_heads + 4 * c.num_key_value_heads)
    fed = 3 * (c.shared_expert_intermediate_size if sparse else c.intermediate_size)
    kept = tokens * (mixed + fed * width) / sizes["tensor"] + tokens * 4 * c.hidden_size * width
    return kept + _dispatched(config, sparse, tokens, sizes)


def _dispatched(config: RunConfig, sparse: bool, tokens: int, sizes: Mapping[str, int]) -> float:
    """Bytes of the rows sent to experts: once as sent, three times in receive buffers."""
    if not sparse:
        return 0.0
    c, width = config.model, jnp.dtype(config.precision.compute).itemsize
    room = config.mesh.moe_buffer_factor if sizes["expert"] > 1 else 1.0
    room = float(sizes["expert"]) if room == -1 else room
    rows = tokens * c.num_experts_per_tok * (3 * room + 1)
    return rows * c.hidden_size * width + 3 * 4 * tokens * c.num_experts


def _stacked(param: Weight) -> bool:
    return param.name.startswith("groups/")


def _restacked(config: RunConfig, param: Weight) -> bool:
    """Whether a parameter is copied beside those of equal neighbours, over which a scan goes."""
    if config.train.remat == "none" or not _stacked(param):
        return False
    layers, i = config.model.group, int(param.name.split("/")[2])
    return layers[i] in (layers[i - 1 : i] + layers[i + 1 : i + 2])


def _layers_are_frozen(params: Iterable[Weight]) -> bool:
    """Whether nothing in or below the layers has a gradient, so that they need no backward pass.

    The MTP module's layer is not one of them.
    """
    frozen = [p.frozen for p in params if _stacked(p) or p.name == "embed_tokens"]
    return bool(frozen) and all(frozen)


def _ways_in_use(param: Weight, sizes: Mapping[str, int]) -> int:
    """Number of shards of a parameter when it is used, after gathering."""
    return sizes["tensor"] * (sizes["expert"] if param.experts else 1)


def communication(
    config: RunConfig, params: Sequence[Weight], sizes: Mapping[str, int]
) -> dict[str, float]:
    """Bytes that a device sends or receives in a step, whichever is more, by purpose."""
    c, tokens = config.model, _tokens_per_device(config, sizes)
    width = jnp.dtype(config.precision.compute).itemsize
    passes = 3 if config.train.remat != "none" else 2  # forward, recomputation, backward
    sent: dict[str, float] = defaultdict(float)
    for p in params:
        used = p.size / _ways_in_use(p, sizes)
        if used > p.own:
            gathers = passes - 1 if _stacked(p) else 1
            sent["parameters gathered"] += gathers * used * width
            if not p.frozen:
                sent["gradients scattered"] += used * width
        if sizes["data"] > 1 and not p.frozen:
            sent["gradients over data"] += p.own * 4
    sparse = sum(sparse for _, sparse in c.layers)
    if sizes["expert"] > 1:
        each = tokens * c.num_experts_per_tok * c.hidden_size * width
        away = (sizes["expert"] - 1) / sizes["expert"]
        # Each pass has dispatch and combine, except that recomputation needs no combine.
        trips = sparse * (2 * passes - (passes == 3))
        trips += 4 * c.mtp_steps * c.mtp_layer[1]
        sent["tokens to experts and back"] += away * each * trips
    if sizes["tensor"] > 1:
        sums = 2 * tokens * c.hidden_size * width
        sent["sums over tensor"] += passes * c.num_hidden_layers * sums
    if sizes["context"] > 1:
        heads, kv_heads = (
            max(n // sizes["tensor"], 1) for n in (c.num_attention_heads, c.num_key_value_heads)
        )
        keys, queries = (2 * tokens * n * c.head_dim * width for n in (kv_heads, heads))
        full = c.mixers.count(FULL) + c.mtp_steps
        rounds = passes - (config.train.remat == "layer_but_attention")
        # In the backward pass the float32 gradients of keys and values go around the ring as well.
        around = sizes["context"] * keys * (rounds + 4 / width)
        sent["keys and values around the ring"] += full * around
        # Queries, keys and values are dealt out anew for attention, and outputs given back, which
        # recomputation may spare.
        dealt = passes * (keys + queries) - (passes - rounds) * queries / 2
        sent["tokens dealt out for attention"] += full * dealt
        state = 4 * c.linear_num_value_heads // sizes["tensor"] * c.linear_key_head_dim
        state *= c.linear_key_head_dim + c.linear_value_head_dim
        rows = max(1, tokens * sizes["context"] // config.train.sequence_length)
        steps = 1 + math.ceil(math.log2(max(sizes["context"] - 1, 1)))
        delta_layers = c.mixers.count(LINEAR)
        sent["delta states"] += delta_layers * passes * (steps * rows * state)
    micro_batches = config.train.gradient_accumulation_steps
    return {purpose: micro_batches * n for purpose, n in sent.items()}


def serving_bytes(config: ModelConfig) -> tuple[int, int]:
    """Cached bytes per token (bfloat16 keys, values) and per sequence (float32 delta states)."""
    per_token = config.mixers.count(FULL) * 2 * config.num_key_value_heads * config.head_dim * 2
    states = config.mixers.count(LINEAR) * config.linear_num_value_heads
    return per_token, states * config.linear_key_head_dim * config.linear_value_head_dim * 4


def step_seconds(
    config: RunConfig, params: Sequence[Weight], sizes: Mapping[str, int], chip: Chip
) -> tuple[float, float]:
    """A rough estimate of a step's time, with all communication hidden and with none.

    Products are taken to run at `_EFFICIENCY` of the chip's peak, which docs/plan.md compares with
    compiled steps; the optimizer reads and writes its state once.
    """
    train = config.train
    tokens = _tokens_per_device(config, sizes) * train.gradient_accumulation_steps / sizes["tensor"]
    flops = tokens * executed_flops(
        config.model, train.sequence_length, remat=train.remat, params=params
    )
    updates = sum(p.own for p in params if not p.frozen) * 28 / chip.hbm_bandwidth
    compute = flops / (_EFFICIENCY * chip.flops) + updates
    sent = sum(communication(config, params, sizes).values()) / chip.ici_bandwidth
    return max(compute, sent), compute + sent
