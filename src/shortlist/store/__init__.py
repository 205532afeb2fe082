"""Snapshots, the event store, user state."""
