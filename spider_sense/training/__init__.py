"""Training: capture activations, fit probes of every family, choose one, calibrate it."""
