"""Protocols, comparison tables, evidence, reports."""
