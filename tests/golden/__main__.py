"""Write the golden curves anew, after a change that is meant to change numbers.

python -m tests.golden            what differs here and now
python -m tests.golden --write    keep what this machine gives
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.golden.compare import apart
from tests.golden.runs import RUNS, read, run_all, write
from tests.training.running import ONE
from tests.world import write_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="overwrite tests/golden/*.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        (world := Path(directory) / "world").mkdir()
        found = run_all(write_world(world), Path(directory), ONE)
    for name in RUNS:
        if arguments.write:
            print(write(name, found[name]))
        else:
            print("\n  ".join([f"{name}:", *(apart(found[name], read(name)[1], 0.0) or ["to the last bit"])]))


if __name__ == "__main__":
    main()
