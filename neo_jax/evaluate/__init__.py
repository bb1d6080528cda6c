"""Scores of a model: perplexity of text."""
