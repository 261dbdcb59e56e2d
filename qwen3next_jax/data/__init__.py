"""Text to batches of tokens, with numpy and Grain; nothing here imports JAX."""
