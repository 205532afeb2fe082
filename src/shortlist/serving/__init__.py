"""The HTTP server, a thin skin on the engine."""
