"""The console: a process of its own that shows and steers a running server through its API alone."""
