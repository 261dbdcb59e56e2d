"""The platform that operations are traced for, which may differ from the one that JAX runs on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# The platforms of implementations that do not run on all of them.
_PLATFORMS = {"pallas": ("tpu", "cpu"), "hopper": ("gpu",), "cudnn": ("gpu",)}


def platform() -> str:
    """The platform of the mesh in use ("cpu", "gpu" or "tpu"), else that of the default backend.

    The mesh may describe devices that this machine does not have: a step for TPUs can be compiled
    without one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def compiler_options(dtype: jax.typing.DTypeLike) -> dict[str, str]:
    """`compiler_options` of `jax.jit` for programs over many tokens.

    By default XLA:CPU hands products, sums and elementwise operations to its library YNNPACK, which
    makes these programs slower (docs/performance.md). In bfloat16 products are left to it, because
    it multiplies bfloat16 as it is, where XLA:CPU makes float32 copies. Other platforms ignore the
    option.

    Args:
      dtype: dtype of activations.
    """
    library = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT" if jnp.dtype(dtype) == jnp.bfloat16 else ""
    return {"xla_cpu_experimental_ynn_fusion_type": library}


def forward_program(function: Callable, **options: Any) -> Callable[[jnp.dtype], Callable]:
    """Compiles a forward pass over many tokens with the `compiler_options` of its dtype.

    Args:
      function: the program.
      options: options of `jax.jit`, such as `static_argnums`.

    Returns:
      A function from the dtype of activations to the program, as `jax.jit` returns it.
    """
    return functools.cache(
        lambda dtype: jax.jit(function, compiler_options=compiler_options(dtype), **options)
    )


def is_hopper() -> bool:
    """Whether the platform is an NVIDIA GPU of the Hopper generation (H100, H200, ...)."""
    if platform() != "gpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    # "H20" also matches H200 and GH200, whose names contain it.
    return any(name in device.device_kind for name in ("H100", "H800", "H20"))


def check_implementation(implementation: str, *known: str) -> None:
    """Checks that an operation has an implementation and that it can run on this platform.

    Args:
      implementation: name to check.
      known: names of the operation's implementations. "pallas" is for TPUs and, interpreted, CPUs,
        "hopper" and "cudnn" are for GPUs; all others run on any platform.

    Raises:
      ValueError: if it is unknown, or for other platforms.
    """
    if implementation not in known:
        *names, last = map(repr, known)
        raise ValueError(f"{implementation=} is unknown; expected {', '.join(names)} or {last}")
    platforms = _PLATFORMS.get(implementation)
    if platforms and platform() not in platforms:
        raise ValueError(
            f"{implementation=} is for {platforms[0].upper()}s, and this is a {platform()}; leave "
            "it out for what suits the platform"
        )
