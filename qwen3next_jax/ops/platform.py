"""The platform that operations are traced for, which may differ from the one that JAX runs on."""

import jax

# `compiler_options` of `jax.jit` for programs over many tokens. By default XLA:CPU hands products
# and sums to its YNNPACK library, which makes these programs slower (docs/performance.md). Other
# platforms ignore the option.
COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


def platform() -> str:
    """The platform of the mesh in use ("cpu", "gpu" or "tpu"), else that of the default backend.

    The mesh may describe devices that this machine does not have: a step for TPUs can be compiled
    without one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def is_hopper() -> bool:
    """Whether the platform is an NVIDIA GPU of the Hopper generation (H100, H200, ...)."""
    if platform() != "gpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    # "H20" also matches H200 and GH200, whose names contain it.
    return any(name in device.device_kind for name in ("H100", "H800", "H20"))


def check_platform(implementation: str) -> None:
    """Checks that an implementation by kernels can run on this platform.

    Args:
      implementation: "pallas", for TPUs and (interpreted) CPUs, or one for GPUs.

    Raises:
      ValueError: if it cannot.
    """
    platforms = ("tpu", "cpu") if implementation == "pallas" else ("gpu",)
    if platform() not in platforms:
        raise ValueError(
            f"{implementation=} is for {platforms[0].upper()}s, and this is a {platform()}; leave "
            "it out for what suits the platform"
        )
