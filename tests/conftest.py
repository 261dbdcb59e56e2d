"""Most of the tests' time is compilation: it is kept short, and its programs between runs."""

import os
import pathlib
import tempfile

# Set before JAX is imported, and inherited by the processes that tests start.
cache = pathlib.Path(tempfile.gettempdir()) / f"qwen3next_jax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    """Compiles what runs a few times only without optimisations, in a fifth of the time.

    The slow proofs run what they compile for minutes, as users do, and so compile as users do.
    """
    if config.option.markexpr != "not slow":
        return
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # which know no other emitters
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])


@pytest.fixture
def untyped():
    """What users meet: array types are checked in tests alone."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def on_hopper(monkeypatch):
    """Lets kernels for Hopper GPUs run: on one where it is there, else interpreted on the CPU."""
    if jax.default_backend() == "gpu":
        yield
        return
    try:
        from jax.experimental.pallas.mosaic_gpu import force_gpu_interpret_mode
    except ImportError:  # JAX 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    from qwen3next_jax.ops.pallas import grouped_hopper

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(grouped_hopper, "_PROCESSORS", 2)  # each is a thread
    with force_gpu_interpret_mode():
        yield
