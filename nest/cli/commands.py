"""Imports every verb, which registers it."""
