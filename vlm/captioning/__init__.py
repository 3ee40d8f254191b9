"""Captions and answers for pictures named on a command line."""
