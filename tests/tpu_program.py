"""A function as the real TPU compiler makes it for one chip, which needs no TPU."""

import jax

from qwen3next_jax.plan import tpu


def compiled(function, topology, *arrays, **options):
    """Of arrays of these shapes and dtypes; `options` are those of `jax.jit`."""
    return lowered(function, topology, *arrays, **options).compile()


def lowered(function, topology, *arrays, **options):
    """The same before it is compiled: its kernels are made, and checked for their types."""
    mesh = jax.sharding.Mesh(tpu.devices(topology)[:1], ("chip",))
    here = jax.NamedSharding(mesh, jax.P())
    arrays = [jax.ShapeDtypeStruct(*x, sharding=here) for x in arrays]
    with jax.set_mesh(mesh):  # which says that the kernels are not to be interpreted
        return jax.jit(function, **options).lower(*arrays)
