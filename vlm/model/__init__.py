"""Encoders, connectors and language models, built from vlm.nn."""
