"""Floor 1: Gemma 2 and Gemma 3 on transformers: load, tokens, capture, intervene, generate.

The one object to start from is ``gemscope.models.gemma.Gemma``.
"""
