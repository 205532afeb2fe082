"""Scores for candidates."""
