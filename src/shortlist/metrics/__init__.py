"""Ranking and classification metrics, intervals and paired tests: pure functions of arrays."""
