"""A process of the demo, which runs its commands one after the other (see stages.py)."""

from __future__ import annotations

import sys

from megatron_gil.cli import main
from megatron_gil.demo.stages import serve

if __name__ == "__main__":
    sys.exit(serve(main))
