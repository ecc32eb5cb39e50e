"""Simulated traffic: innocent tenants, campaigns, attackers that adapt. Deterministic by seed.

Nothing here is real use of a language model. What a bench measures on it holds for it.
"""
