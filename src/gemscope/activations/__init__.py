"""Floor 2: activations captured from a model (``harvest``) and kept as rows (``sets``)."""
