"""Ahead-of-time gate: compile every kernel for every target, on a machine without a GPU, and check what came out.

``python -m sense_kernels.aot`` runs the project's own launch functions on tensors without memory, compiles what they
would have launched, and reads registers, spills, shared memory, tensor-core instructions and load widths off the
result.
"""
