from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.processes import Sides


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "a JSON file (tools/gpu_results.py) to write each outcome into; what passed there is not run again"
    parser.addoption("--record", type=Path, metavar="FILE", help=text)


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--record", None)
    if file is not None:
        config.pluginmanager.register(Record(file))


class Record:
    """Keeps the outcome of each test of this folder, as soon as it is known."""

    def __init__(self, file: Path) -> None:
        import torch

        from tools.gpu_results import Results, describe_machine

        self._results = Results.continued(file, describe_machine("cuda" if torch.cuda.is_available() else "cpu"))
        self._passed = {name for name, outcome in self._results.tests.items() if outcome == "passed"}
        self._results.tests = {name: "passed" for name in self._results.tests if name in self._passed}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.nodeid in self._passed:
            pytest.skip("passed before, on this machine with this commit")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is three reports: its set-up, itself and its end; only the second one tells that it passed."""
        if report.nodeid in self._passed or (report.passed and report.when != "call"):
            return
        self._results.tests[report.nodeid] = report.outcome
        self._results.save()


@pytest.fixture(scope="session")
def sides(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(world, tmp_path_factory.mktemp("sides"))
