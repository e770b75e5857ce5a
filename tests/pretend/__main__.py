"""Run a module or a script on a pretended GPU; what it counted is said at the end.

python -m tests.pretend [--report FILE.json] -m MODULE ARGUMENTS...
python -m tests.pretend [--report FILE.json] SCRIPT ARGUMENTS...
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

from tests.pretend.device import pretended_gpus
from tests.pretend.report import Report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.pretend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write all counts there")
    parser.add_argument("-m", action="store_true", dest="is_module", help="WHAT is a module, not a script")
    parser.add_argument("what", metavar="WHAT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS")
    given = parser.parse_args()
    sys.argv = [given.what, *given.arguments]
    with pretended_gpus() as report:
        try:
            if given.is_module:
                runpy.run_module(given.what, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(given.what, run_name="__main__")
        finally:
            _say(report, given.report)


def _say(report: Report, path: Path | None) -> None:
    print(f"{report.num_launches} kernel launches, {report.num_syncs} host synchronisations", file=sys.stderr)
    for sync, count in report.syncs.most_common():
        print(f"{count:7}  {sync}", file=sys.stderr)
    if path is not None:
        path.write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
