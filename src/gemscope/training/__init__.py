"""Floor 3: training of dictionaries on stored activations."""
