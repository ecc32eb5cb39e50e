"""Guarding vLLM: the plugin, what it hooks, and what it answers."""
