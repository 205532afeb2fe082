"""Stages, chains, rules, meter and the engine."""
