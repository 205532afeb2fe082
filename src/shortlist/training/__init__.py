"""Trainer, optimisers, checkpoints."""
