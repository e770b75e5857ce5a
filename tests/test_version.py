"""The version is written in the package, from where setup.py reads it, and in the files that people read."""

from pathlib import Path

import yaml

from megatron_gil import __version__

ROOT = Path(__file__).parents[1]


def test_the_citation_and_the_changelog_have_the_packages_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
