"""From text to packed batches; numpy and Grain, no JAX."""
