"""The model's modules, each of which stands alone."""
