"""The same as `megatron-gil convert`, by its old name."""

from __future__ import annotations

import sys

from megatron_gil.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
