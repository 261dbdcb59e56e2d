"""Parameters on disk: our checkpoints and Hugging Face's tensors."""
