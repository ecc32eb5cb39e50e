"""Greedy generation, whatever a model brings."""

__all__ = ["GREEDY"]

GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""Options of ``generate`` against a model's own defaults: to sample, how, and to penalise repetition."""
