"""The grid is scripts beside one another, as users run them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "miniature"))
