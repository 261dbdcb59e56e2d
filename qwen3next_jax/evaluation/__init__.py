"""What a model is worth: held-out text, tasks, long contexts, and drafts that stand."""
