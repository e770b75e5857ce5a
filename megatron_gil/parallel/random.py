"""Every stream of random numbers a rank draws from, for a resume that continues with the same numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def get_rng_state() -> dict[str, Any]:
    """Python's, numpy's, torch's (CPU and this GPU) and megatron's streams: tensors, numbers, strings and containers
    of them, which `torch.load` reads with weights_only."""
    numpy_state: Any = np.random.get_state(legacy=True)
    numpy_name, numpy_words, *numpy_rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (numpy_name, torch.from_numpy(numpy_words.astype(np.int64)), *numpy_rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": {name: stream.clone() for name, stream in _tracker().get_states().items()},
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy_name, numpy_words, *numpy_rest = state["numpy"]
    np.random.set_state((numpy_name, numpy_words.numpy().astype(np.uint32), *numpy_rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states({name: stream.clone() for name, stream in state["megatron"].items()})


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()
