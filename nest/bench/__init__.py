"""The comparison: every arm tuned from the same lessons with the same budget, and measured on files none has seen."""
