"""Fast paths for hot operations, each beside a plain reference."""
