"""Compiles a run's step for TPUs that are not here, and estimates its time.

The package `libtpu` holds the whole TPU compiler and describes machines by their topology. What it
compiles for them is what they would run, so the memory it reports is what a device would hold.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax

from qwen3next_jax.config import RunConfig
from qwen3next_jax.parallel.mesh import make_mesh
from qwen3next_jax.plan.chips import known_topologies, parse_topology
from qwen3next_jax.plan.hlo import Estimate, estimate
from qwen3next_jax.training.program import make_program


def devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, to build a mesh from; none of them is here.

    Raises:
      ValueError: the topology is unknown.
      ModuleNotFoundError: the TPU compiler is not installed; says how to.
    """
    parse_topology(topology)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "The TPU compiler is not installed: pip install 'qwen3next_jax[tpu]'"
        ) from error
    # The compiler asks who it is on a real machine's network; here nobody would answer. Two plans
    # may compile at a time, which two users of one TPU may not.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, ValueError) as error:
        known = known_topologies(topology.partition(":")[0])
        raise ValueError(
            f"The compiler refuses the topology {topology!r} ({error}); known are {known}"
        ) from error
    return list(description.devices)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step."""

    seconds: float  # that the compilation took
    memory: dict[str, float]  # bytes a device holds at the peak, by what they are
    estimate: Estimate
    text: str  # the compiled program


class OutOfMemoryError(RuntimeError):
    """The step does not fit; the message is the compiler's."""


def compile_step(config: RunConfig, topology: str) -> Compiled:
    """Compiles the real train step of a run for a topology.

    Raises:
      OutOfMemoryError: a device cannot hold it.
      ValueError, ModuleNotFoundError: as `devices`; the mesh does not fit the topology or the
        model.
    """
    chip, _ = parse_topology(topology)
    mesh = make_mesh(config.mesh, devices(topology))
    program = make_program(config, mesh)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.state, program.batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemoryError(str(error).splitlines()[0]) from error
            raise
    seconds = time.monotonic() - start
    text = compiled.as_text()
    return Compiled(seconds, memory(compiled.memory_analysis()), estimate(text, chip), text)


def memory(analysis: Any) -> dict[str, float]:
    """Bytes a device holds at the peak, by what they are, from `Compiled.memory_analysis()`.

    Donated arguments and the results that take their place are one and the same. What the analysis
    calls temporary is not used: where arguments are donated it counts buffers of loops twice, and
    arguments with it come to more than the compiler's own assignment of buffers, which is the peak.
    """
    state = analysis.argument_size_in_bytes
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "state and batch": float(state),
        "results": float(results),
        "temporary": float(analysis.peak_memory_in_bytes - state - results),
        "program": float(analysis.generated_code_size_in_bytes),
    }
