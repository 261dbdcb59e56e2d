"""The platform that operations are traced for, which need not be the one that JAX runs on."""

import jax


def platform() -> str:
    """The platform of the mesh in use ("cpu", "gpu" or "tpu"), else the default backend's.

    The mesh may describe devices that the machine lacks: a step for a TPU can be compiled without.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def check_kernels_run() -> None:
    """Checks that kernels for TPUs can run: there, or on a CPU, where they are interpreted.

    Raises:
      ValueError: on any other platform.
    """
    if platform() not in ("tpu", "cpu"):
        raise ValueError(
            f"implementation='pallas' is for TPUs, and this is a {platform()}; leave it out for "
            "what suits the platform"
        )


def require_tokens(tokens: int) -> None:
    """Refuses rows of length 0, by a ValueError."""
    if not tokens:
        raise ValueError("The rows hold no token; give at least one")
