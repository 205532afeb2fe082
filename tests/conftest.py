"""For all tests: one thread, since two make tiny tensors many times slower on a busy machine and no test measures speed."""

import torch

torch.set_num_threads(1)
