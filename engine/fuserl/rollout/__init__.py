"""Prompts in, sampled completions and their log-probabilities out."""
