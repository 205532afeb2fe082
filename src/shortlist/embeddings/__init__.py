"""Sparse parameters behind one interface."""
