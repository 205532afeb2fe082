"""Makes training_toys importable: the tests share it with a process of their own that gets killed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
