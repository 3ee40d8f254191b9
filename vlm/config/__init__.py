"""The settings of a run: pure data, no torch."""
