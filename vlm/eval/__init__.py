"""Evaluation: retrieval ranks, caption scores, and the page that shows them."""
