"""Hot inner loops, each beside a plain form that it must agree with. They import torch, numpy and the standard library alone."""
