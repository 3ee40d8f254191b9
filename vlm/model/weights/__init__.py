"""Weights as published, and as ours: one table per family."""
