"""The platform that operations are traced for, which need not be the one that JAX runs on."""

import jax

# Of `jax.jit`, for programs over many tokens. By default XLA gives products and sums on CPUs to its
# YNNPACK library, which makes these slower (docs/performance.md). Other platforms ignore it.
COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def platform() -> str:
    """The platform of the mesh in use ("cpu", "gpu" or "tpu"), else the default backend's.

    The mesh may describe devices that the machine lacks: a step for a TPU can be compiled without.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_hopper() -> bool:
    """Whether the platform is a GPU of the H100's generation."""
    if platform() != "gpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return any(name in device.device_kind for name in ("H100", "H200", "H800", "H20", "GH200"))


def check_platform(implementation: str) -> None:
    """Checks that kernels can run: on their platform, or for TPUs', interpreted on a CPU.

    Raises:
      ValueError: on any other platform.
    """
    platforms = ("tpu", "cpu") if implementation == "pallas" else ("gpu",)
    if platform() not in platforms:
        raise ValueError(
            f"{implementation=} is for {platforms[0].upper()}s, and this is a {platform()}; leave "
            "it out for what suits the platform"
        )
