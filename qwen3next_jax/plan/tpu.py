"""Compiles a run's step for TPUs that are not present, and estimates its time.

The package `libtpu` has the whole TPU compiler and descriptions of machines by their topology. It
compiles the program that those machines would run, so the memory it reports is that of a device.
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
    """Abstract devices of a topology, to build a mesh from.

    Raises:
      ValueError: the topology is unknown.
      ModuleNotFoundError: the TPU compiler is not installed; says how to install it.
    """
    parse_topology(topology)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "The TPU compiler is not installed: pip install 'qwen3next_jax[tpu]'"
        ) from error
    # On a real TPU libtpu queries the machine's metadata server, which does not exist here. It also
    # allows one process per TPU only, whereas several plans may compile at a time.
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
    """A compiled step, with the compiler's figures."""

    seconds: float  # duration of the compilation
    memory: dict[str, float]  # bytes that a device holds at the peak, by kind
    estimate: Estimate
    text: str  # the compiled program


class OutOfMemoryError(RuntimeError):
    """The step does not fit; the message is the compiler's."""


def compile_step(config: RunConfig, topology: str) -> Compiled:
    """Compiles the real train step of a run for a topology.

    Raises:
      OutOfMemoryError: a device cannot hold it.
      ValueError: the topology is unknown, or the mesh does not fit it or the model.
      ModuleNotFoundError: the TPU compiler is not installed.
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
    """Bytes that a device holds at the peak, by kind, from `Compiled.memory_analysis()`.

    Donated arguments and the results that alias them are counted once. The analysis' own figure for
    temporaries is not used: with donated arguments it counts buffers of loops twice, so that with
    the arguments it exceeds the peak of the compiler's buffer assignment.
    """
    state = analysis.argument_size_in_bytes
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
        "state and batch": float(state),
        "results": float(results),
        "temporary": float(analysis.peak_memory_in_bytes - state - results),
        "program": float(analysis.generated_code_size_in_bytes),
    }
