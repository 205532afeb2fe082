"""Hot inner loops, each beside a plain PyTorch reference that it must agree with. Imports with torch, numpy and the standard library alone."""
