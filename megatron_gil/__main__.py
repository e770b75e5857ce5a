import sys

from megatron_gil.cli import main

if __name__ == "__main__":  # processes that checkpoint writers or data loaders spawn import this file
    sys.exit(main())
