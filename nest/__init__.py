"""Neuron-selective tuning: find the MLP neurons that carry a weakness, group them, tune one vector a group.

After NeST (arXiv 2602.16835). The result is a patch (:mod:`spider_sense.patch`).
"""
