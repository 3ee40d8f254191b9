"""The main job, end to end, on the real pictures this package carries."""
