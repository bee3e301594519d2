"""Floor 1: dictionaries on disk."""
