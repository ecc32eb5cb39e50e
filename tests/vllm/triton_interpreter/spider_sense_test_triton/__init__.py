"""A Triton backend for tests: under ``TRITON_INTERPRET=1`` kernels are interpreted, so vLLM's second runner starts.

It is found by its entry point when this folder's parent is on the path, and compiles nothing.
"""
