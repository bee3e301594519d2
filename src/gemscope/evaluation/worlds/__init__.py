"""Activations whose features are known: do a trainer and the instruments find them?"""
