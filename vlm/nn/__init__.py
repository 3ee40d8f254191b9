"""Tensor pieces: they know nothing of images, text files, configs or training."""
