"""Floor 2: what a model does with one text: attention, its differences, the forming of a prediction, layer by layer."""
