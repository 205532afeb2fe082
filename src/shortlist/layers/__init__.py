"""Blocks and losses that several systems share."""
