"""Published checkpoints as their authors released them: found, built from our parts, loaded, and written back."""
