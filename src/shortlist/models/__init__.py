"""One published system is one file."""
