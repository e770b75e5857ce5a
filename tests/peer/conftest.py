from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def quiet_and_in_float64() -> Any:
    """No telemetry from TRL; and transformers' Llama norm, float32 for any input, computes in the dtype it is given.

    The model itself is compared with transformers as it is in tests/models; here it must not hide what a loss does.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")
        patch.setattr(LlamaRMSNorm, "forward", _norm)
        yield


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where TRL may write."""
    return tmp_path_factory.mktemp("trl")
