"""Guarding servers: the plugin for vLLM, what it hooks and what it answers; and the server of transformers."""
