"""Floor 3: how good a dictionary is: fidelity, sparsity, delta loss, labelled concepts."""
