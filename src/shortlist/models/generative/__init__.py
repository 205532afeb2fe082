"""Semantic ids and constrained decoding."""
