"""Floor 1: learned dictionaries (SAE) and the sparse arithmetic they share."""
