"""Floor 2: a generated world with known truth, and the tiny Gemma 3 trained on it."""
