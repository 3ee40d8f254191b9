"""A toolkit for vision-language models: import from the defining module."""

__version__ = "0.1.0"
