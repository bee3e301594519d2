"""Floor 4: a model with its dictionaries and their evaluation in one folder; built by ``quickstart``, read by
``look``.
"""
