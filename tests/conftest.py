"""Compiled programs are kept between runs of the tests: most of their time is compilation."""

import os
import pathlib
import tempfile

# Set before JAX is imported, and inherited by the processes that tests start.
cache = pathlib.Path(tempfile.gettempdir()) / f"qwen3next_jax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


import jaxtyping  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def untyped():
    """What users meet: array types are checked in tests alone."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
