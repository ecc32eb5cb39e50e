"""The extraction detector beside every baseline, on simulated traffic, with the split by principal and by family."""
