from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time, and none too slow: a red run must mean a change, not a busy machine or a lucky draw.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

# A shell starts `make test &` with Ctrl-C ignored, nohup with a lost terminal too. The commands that tests start would
# inherit that; what has a handler here is not ignored there.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

TESTS = Path(__file__).parent
SLOW = (
    *(
        "demo",
        "faults",
        "fuzz",
        "miniature",
        "peer",
        "slurm",
        "convert/test_verify.py",
        "evaluation/test_judge_web_browser.py",
        "evaluation/test_judge_web_server.py",
        "evaluation/test_llm_judge_command.py",
        "evaluation/test_llm_judge_server.py",
        "gpu/test_sides_on_the_cpu.py",
        "parallel",
        "pretend",
        "test_bench_cpu.py",
        "test_bench_gpu.py",
        "test_console.py",
        "test_examples.py",
        "test_verifiable.py",
    ),
    *(f"engine/test_{name}.py" for name in ("checkpoint", "decoder", "generation", "optimizer", "skipped_updates")),
    *(f"models/test_{name}.py" for name in ("equals_transformers", "hf")),
    *(f"training/test_{name}.py" for name in ("gradients", "keep_best", "resume", "score_range", "what_a_run_says")),
    *("planning/test_memory.py", "test_cli.py", "engine/test_stories.py", "training/test_hub_names.py"),
    *(
        f"training/test_{name}.py"
        for name in (
            "audit",
            "bitwise_facts",
            "boards",
            "check_run",
            "plain_ppo",
            "rewards",
            "score_function",
            "score_pairs",
            "shaping_over_ranks",
        )
    ),
)
"""Folders and files that `make test-quick` leaves out: each starts many processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(TESTS)
        if any(place.is_relative_to(slow) for slow in SLOW):
            item.add_marker(pytest.mark.slow)


def shows_gpu(expression: str) -> bool:
    """Whether pytest was asked, with -m, for tests marked gpu alone: `gpu`, or `gpu and ...`."""
    words = expression.split()
    return words[:1] == ["gpu"] and "or" not in words


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` the tests, and every process that they start, see no GPU: `make test` means the same everywhere.

    Nothing has asked CUDA for its devices yet: torch is imported by the test modules.
    """
    if not shows_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not shows_gpu(item.config.option.markexpr):
        pytest.skip("without `-m gpu` tests see no GPU")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's files (world.py); tests read them and write elsewhere."""
    from tests.world import write_world  # here: it imports torch

    return write_world(tmp_path_factory.mktemp("world"))
