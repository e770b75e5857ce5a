from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stories() -> Path:
    """A really trained Llama in Hugging Face format, of five layers."""
    root = Path(os.environ.get("MEGATRON_GIL_DATA", Path(__file__).parents[2] / "../shared/data"))
    directory = root / "stories260k-hf"
    if not directory.is_dir():
        pytest.skip(f"MEGATRON_GIL_DATA={root} holds no stories260k-hf")
    return directory.resolve()
