from __future__ import annotations

import os
from pathlib import Path

import pytest


def _data_root() -> Path:
    return Path(os.environ.get("MEGATRON_GIL_DATA", Path(__file__).parents[2] / "../shared/data"))


@pytest.fixture(scope="session")
def public_data() -> Path | None:
    """The directory of public data files; a test does without them where they are absent."""
    root = _data_root()
    return root.resolve() if root.is_dir() else None


@pytest.fixture(scope="session")
def stories() -> Path:
    """A really trained Llama in Hugging Face format, of five layers."""
    root = _data_root()
    directory = root / "stories260k-hf"
    if not directory.is_dir():
        pytest.skip(f"MEGATRON_GIL_DATA={root} holds no stories260k-hf")
    return directory.resolve()
