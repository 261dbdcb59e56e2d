"""Estimates what a run will cost, without a device.

    python -m qwen3next_jax.plan --config=FILE [--config.KEY=V ...] [--topology=v5p:4x4x4]
    python -m qwen3next_jax.plan --config=FILE --compile [--hlo=FILE]
    python -m qwen3next_jax.plan --config=FILE --search [--best=2]

The first form answers at once, by arithmetic. `--compile` compiles the train step with the TPU
compiler, which takes minutes; `--search` ranks meshes and remat choices and compiles the best few.
`--json` prints one object as the last line.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from qwen3next_jax.command import check_writable, explain_unknown_key, friendly_errors, write_atomic
from qwen3next_jax.config import ModelConfig, RunConfig
from qwen3next_jax.parallel.mesh import AXES, axis_sizes
from qwen3next_jax.plan import costs, search, tpu
from qwen3next_jax.plan.chips import Chip, parse_topology
from qwen3next_jax.training.program import Program, make_program
from qwen3next_jax.training.step import split_frozen

# Configs import `configs`, which lies beside the package in a clone; the command runs anywhere.
sys.path.append(str(pathlib.Path(__file__).parents[2]))

_ONE = dict.fromkeys(AXES, 1)  # the mesh of one device

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config file.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5p:4x4x4", "The machine: chip and torus, or GPU and number (h200:64)."
)
_COMPILE = flags.DEFINE_bool("compile", False, "Compile the step with the TPU compiler.")
_HLO = flags.DEFINE_string("hlo", None, "With --compile: a file for the compiled text.")
_SEARCH = flags.DEFINE_bool("search", False, "Rank meshes and remat choices.")
_BEST = flags.DEFINE_integer("best", 2, "With --search: how many to compile.", lower_bound=0)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object as the last line.")


@friendly_errors()
def main(argv: list[str]) -> None:
    """Prints the plan."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}; values are given as --config.KEY=V")
    if _CONFIG.value is None:
        raise app.UsageError("--config=FILE is needed, such as --config=configs/80b_a3b.py")
    if _HLO.value and not _COMPILE.value:
        raise app.UsageError("--hlo needs --compile")
    if _HLO.value:  # checked now, since compilation takes minutes
        check_writable(pathlib.Path(_HLO.value))
    jax.config.update("jax_platforms", "cpu")  # no device is used, here or elsewhere
    config = RunConfig.from_dict(_CONFIG.value.to_dict())
    chip, places = parse_topology(_TOPOLOGY.value)
    if _COMPILE.value and chip.is_gpu:
        raise ValueError(
            f"--compile asks the TPU compiler, which knows no {_TOPOLOGY.value}; leave it out for "
            "the plan by arithmetic"
        )
    # Shapes are the same on every mesh.
    program = make_program(config, search.abstract_mesh(_ONE))
    refusal = None
    try:
        sizes = axis_sizes(config.mesh, places)
        search.check_trains(config, program.state, sizes)
    except ValueError as error:
        if not _SEARCH.value or _COMPILE.value:
            raise
        refusal = error  # another mesh may fit
    result = _model(config, program)
    if refusal is None:
        result.update(_layout(config, program, sizes, chip))
    else:
        print(f"\nThe config's own mesh will not do: {refusal}")
        unknown = dict.fromkeys(("memory_bytes", "step_seconds", "step_seconds_bounds", "mesh"))
        result.update(unknown, fits=False, error=str(refusal))
    if _SEARCH.value:
        result["search"] = _search(config, program, chip, places)
    if _COMPILE.value:
        result.update(_compiled(config, program, chip, places))
    if _JSON.value:
        print(json.dumps(result))


def _model(config: RunConfig, program: Program) -> dict[str, Any]:
    """Prints and returns the costs that do not depend on the mesh."""
    c, t = config.model, config.train
    s = t.sequence_length
    params = program.state.params
    parts = costs.parameters(params)
    total = sum(parts.values())
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    weights = _weights(config, program, _ONE)
    frozen = sum(p.size for p in weights if p.frozen)
    print(
        f"Parameters: {total:,}, active for a token {costs.active_parameters(params, c):,}"
        + (f", frozen {frozen:,}" if frozen else "")
    )
    _table({part: f"{n:,}" for part, n in parts.items()})

    forward = costs.forward_flops(c, s)
    flops = sum(forward.values())
    training = costs.train_flops(c, s, weights)
    executed = costs.executed_flops(c, s, remat=t.remat, params=weights)
    print(f"\nOperations a token, forward, at {s:,} tokens of context: {flops / 1e9:.3f} G")
    _table({part: f"{n / 1e9:.3f} G" for part, n in forward.items()})
    print(
        f"  training {training / 1e9:.2f} G a token; a step executes {executed / 1e9:.2f} G "
        f"(remat={t.remat!r}) and has {t.global_batch_size * s:,} tokens"
    )

    yardstick = ModelConfig.from_hf(costs.YARDSTICK)
    print("\nBeside dense Qwen3-32B (forward operations a token; cached bytes a token)")
    print(f"  {'context':>9} {'this':>9} {'without MTP':>12} {'32B':>9} {'ratio':>6} {'cache':>7}")
    cached, states = costs.serving_bytes(c)
    dense = costs.serving_bytes(yardstick)[0]
    for context in (4096, 32768, 131072, 262144):
        with_mtp = sum(costs.forward_flops(c, context).values())
        without = sum(costs.forward_flops(c, context, mtp=False).values())
        theirs = sum(costs.forward_flops(yardstick, context).values())
        print(
            f"  {context:>9,} {with_mtp / 1e9:>7.2f} G {without / 1e9:>10.2f} G "
            f"{theirs / 1e9:>7.2f} G {theirs / without:>5.1f}x "
            f"{dense / (cached + states / context):>6.1f}x"
        )
    print("  The makers claim a training cost under a tenth and over ten times the throughput")
    print("  beyond 32K tokens. Compute alone is not a tenth at 4K.")
    print(f"\nTraining state {state / 1e9:,.2f} GB in all")
    return {
        "parameters": total,
        "parameters_by_part": parts,
        "active_parameters": costs.active_parameters(params, c),
        "frozen_parameters": frozen,
        "flops_per_token": flops,
        "flops_by_part": forward,
        "executed_flops_per_token": executed,
        "training_state_bytes": state,
        "topology": _TOPOLOGY.value,
        "source": "arithmetic",
    }


def _layout(
    config: RunConfig, program: Program, sizes: dict[str, int], chip: Chip
) -> dict[str, Any]:
    """Prints and returns the costs on the config's own mesh, by arithmetic."""
    laid_out = _weights(config, program, sizes)
    width = _optimizer_width(config, program)
    memory = costs.memory(config, laid_out, sizes, optimizer_width=width)
    used = sum(memory.values())
    sent = costs.communication(config, laid_out, sizes)
    low, high = costs.step_seconds(config, laid_out, sizes, chip)
    more = "" if chip.is_gpu else "; --compile knows more"
    print(f"\nOn {_TOPOLOGY.value}, mesh {sizes}:")
    print(f"  memory a device: {used / 1e9:.2f} GB of {chip.hbm / 1e9:.1f} GB")
    _table({part: f"{n / 1e9:.2f} GB" for part, n in memory.items()})
    print(f"  communication a device and step: {sum(sent.values()) / 1e9:.2f} GB")
    _table({part: f"{n / 1e9:.2f} GB" for part, n in sent.items()})
    print(f"  a step takes about {low:.2f} to {high:.2f} s (by arithmetic{more})")
    return {
        "memory_bytes": used,
        "memory_by_part": memory,
        "communication_bytes": sent,
        "fits": used <= chip.hbm,
        "step_seconds": high,
        "step_seconds_bounds": [low, high],
        "mesh": sizes,
    }


def _weights(config: RunConfig, program: Program, sizes: dict[str, int]) -> list[costs.Weight]:
    """The run's parameters on a mesh of these sizes."""
    mesh, frozen = search.abstract_mesh(sizes), config.train.frozen_parameters
    return costs.weights(program.state.params, mesh, frozen)


def _optimizer_width(config: RunConfig, program: Program) -> float:
    """Bytes of optimizer state per parameter that is not frozen."""
    trained, _ = split_frozen(program.state.params, config)
    state, params = (jax.tree.leaves(x) for x in (program.state.opt_state, trained))
    return sum(x.size * x.dtype.itemsize for x in state) / sum(x.size for x in params)


def _compiled(config: RunConfig, program: Program, chip: Chip, places: int) -> dict[str, Any]:
    """Compiles the step; prints and returns what the compiler says."""
    print(f"\nCompiling the step for {_TOPOLOGY.value}; this takes minutes ...", flush=True)
    try:
        compiled = tpu.compile_step(config, _TOPOLOGY.value)
    except tpu.OutOfMemoryError as error:
        print(f"  It does not fit: {error}")
        unknown = dict.fromkeys(("memory_bytes", "step_seconds", "step_seconds_bounds"))
        return {**unknown, "fits": False, "source": "compiler", "error": str(error)}
    if _HLO.value:
        write_atomic(pathlib.Path(_HLO.value), compiled.text)
    used = sum(compiled.memory.values())
    e, t = compiled.estimate, config.train
    low, high = e.step_seconds
    tokens = t.global_batch_size * t.sequence_length / places
    weights = _weights(config, program, _ONE)
    flops = costs.train_flops(config.model, t.sequence_length, weights)
    mfu = tokens * flops / high / chip.flops
    print(f"  compiled in {compiled.seconds:.0f} s")
    print(f"  memory a device: {used / 1e9:.2f} GB of {chip.hbm / 1e9:.1f} GB")
    _table({part: f"{n / 1e9:.2f} GB" for part, n in compiled.memory.items()})
    print(
        f"  step: {low:.2f} s (communication hidden) to {high:.2f} s (not hidden): "
        f"{e.fusion_seconds:.2f} s fusions, {e.kernel_seconds:.2f} s kernels, "
        f"{e.collective_seconds:.2f} s collectives"
    )
    _table({kind: f"{n / 1e9:.2f} GB" for kind, n in e.collective_bytes.items()})
    print(f"  {tokens / high:,.0f} tokens/s/chip, MFU {mfu:.1%}, nothing hidden")
    print("  what takes longest:")
    for name, seconds in e.dominant:
        print(f"    {seconds:8.4f} s  {name[-110:]}")
    for name in e.uncosted:
        print(f"    NOT IN THE ESTIMATE: {name[-110:]}")
    return {
        "memory_bytes": used,
        "memory_by_part": compiled.memory,
        "fits": used <= chip.hbm,
        "step_seconds": high,
        "step_seconds_bounds": [low, high],
        "tokens_per_second_per_chip": tokens / high,
        "mfu": mfu,
        "estimate": dataclasses.asdict(e),
        "compile_seconds": compiled.seconds,
        "source": "compiler",
    }


def _search(config: RunConfig, program: Program, chip: Chip, places: int) -> list[dict[str, Any]]:
    """Ranks meshes and remat choices, compiles the best, and prints and returns both."""
    width = _optimizer_width(config, program)
    candidates = search.rank(config, program.state, chip, places, optimizer_width=width)
    if not candidates:
        print("\nBy arithmetic, no mesh holds this run: take more chips, or fewer tokens a step.")
        return []
    print(f"\n{len(candidates)} layouts fit by arithmetic; the fastest of them:")
    rows: list[dict[str, Any]] = []
    for i, candidate in enumerate(candidates[:10], start=1):
        low, high = candidate.step_seconds
        used = {axis: n for axis, n in candidate.mesh.items() if n > 1}
        remat, memory = candidate.config.train.remat, candidate.memory_bytes
        print(
            f"{i:3} {low:7.2f} to {high:6.2f} s  {memory / 1e9:6.1f} GB  remat={remat:19}  {used}",
            flush=True,
        )
        rows.append(dict(mesh=candidate.mesh, remat=remat, memory_bytes=memory, step_seconds=high))
    try:
        for i in range(0 if chip.is_gpu else min(_BEST.value, len(rows))):
            rows[i]["compiled"] = _compiled_candidate(candidates[i], number=i + 1)
    except ModuleNotFoundError as error:
        print(f"None is compiled. {error}")
    _print_fastest(rows)
    return rows


def _compiled_candidate(candidate: search.Candidate, *, number: int) -> dict[str, float] | str:
    """Compiles a layout; prints and returns its costs, or why it does not compile."""
    try:
        compiled = tpu.compile_step(candidate.config, _TOPOLOGY.value)
    except (tpu.OutOfMemoryError, jax.errors.JaxRuntimeError, ValueError) as error:
        print(f"{number:3} by the compiler: {error}")
        return str(error)
    memory = sum(compiled.memory.values())
    low, high = compiled.estimate.step_seconds
    print(
        f"{number:3} by the compiler: {low:.2f} to {high:.2f} s, {memory / 1e9:.1f} GB", flush=True
    )
    return dict(memory_bytes=memory, step_seconds=high)


def _print_fastest(rows: list[dict[str, Any]]) -> None:
    """Prints the options for the fastest layout that compiled, or else was not refused."""
    compiled = [row for row in rows if isinstance(row.get("compiled"), dict)]
    untried = [row for row in rows if "compiled" not in row]
    if compiled:
        how, best = "of the compiled", min(compiled, key=lambda r: r["compiled"]["step_seconds"])
    elif untried:
        how, best = "by arithmetic", untried[0]
    else:
        return
    sizes = " ".join(f"--config.mesh.{axis}={n}" for axis, n in best["mesh"].items())
    print(f"Fastest {how}: --config.train.remat={best['remat']} {sizes}")


def _table(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"    {name:<{width}}  {value:>18}")


if __name__ == "__main__":
    app.run(main, flags_parser=explain_unknown_key()(app.parse_flags_with_usage))
