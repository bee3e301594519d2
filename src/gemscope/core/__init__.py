"""Floor 0: sites, errors, array types, atomic files, provenance, device and dtype."""
