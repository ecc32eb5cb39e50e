"""Screening of an agent's conversation: sense first, look closer only at what was sensed.

The stages of a conversation are read from what the server renders, each is sensed by probes on the served model's own
activations, and only what is suspect goes on to the nearest signature and to a judge.
"""
