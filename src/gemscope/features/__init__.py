"""Floor 3: the evidence for every latent of many dictionaries, found in one pass; search in it; steering with it."""
