"""Tar shards, pictures and captions in; finished batches out. Knows nothing of models, losses or configs."""
