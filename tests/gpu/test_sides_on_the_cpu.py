"""What the tests on a GPU are made of, on the CPU: both sides run, agree with themselves, and a difference is found."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_gil.algo.masked import whiten
from tests.conftest import shows_gpu
from tests.gpu.compare import apart, flatten
from tests.gpu.processes import Sides
from tests.gpu.synchronisations import WARNING, compare_counts, record_lines


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("", False),
        ("not gpu", False),
        ("not gpu and not long", False),
        ("gpu or slow", False),
        ("slow", False),
    ],
)
def test_only_a_run_of_gpu_tests_sees_the_gpu(expression: str, shown: bool) -> None:
    assert shows_gpu(expression) == shown


def test_this_run_sees_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


@pytest.mark.long
def test_a_side_repeats_itself_and_bfloat16_comes_near(sides: Sides) -> None:
    first, again = flatten(sides.of("cpu")), flatten(sides.run("cpu", name="again_"))
    assert apart(again, first, 0.0) == []
    mixed = flatten(sides.of("cpu", "bfloat16"))
    shared = {name: first[name] for name in mixed}
    assert len(shared) > 100
    assert apart(mixed, shared, 1e-4) != []
    assert [name for name in mixed if "NaN" in str(mixed[name])] == []


def test_a_difference_is_named_with_its_size() -> None:
    ours = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2]), "c": 1.0, "d": torch.zeros(2)}
    theirs = {"a": torch.tensor([1.0, 4.1]), "b": torch.tensor([3]), "c": 1.0, "d": torch.zeros(2)}
    assert apart(ours, theirs, 0.05) == ["b: not equal"]
    assert apart(ours, theirs, 0.01) == ["b: not equal", "a: 2.4e-02"]
    assert apart({"a": torch.tensor([float("nan")])}, {"a": torch.ones(1)}, 0.01) == ["a: nan"]
    assert apart({"a": torch.ones(2)}, {"a": torch.ones(3)}, 1.0) == ["a: not equal"]
    with pytest.raises(AssertionError):
        apart({"a": torch.ones(2)}, {}, 1.0)


def test_warnings_are_counted_by_the_line_of_the_package_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(tensor: torch.Tensor) -> torch.Tensor:
        warnings.warn(f"{WARNING} (Triggered internally at ...)", stacklevel=1)
        return tensor

    monkeypatch.setattr(torch, "rsqrt", warn)
    counts: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with record_lines(WARNING, counts):
            for _ in range(3):
                whiten(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), all_sum=torch.clone)
            warn(torch.ones(1))
            warnings.warn("something else", stacklevel=1)
    assert counts.pop("elsewhere") == 1
    ((place, number),) = counts.items()
    assert number == 3
    file, line = place.split(":")
    source = (Path(__file__).parents[2] / file).read_text().splitlines()
    assert "rsqrt" in source[int(line) - 1]
    assert [str(other.message) for other in others] == ["something else"]
    assert compare_counts(counts, {place: 3}) == []
    assert compare_counts(counts, {place: 2, "x:1": 1}) == [
        f"{place}: 3 on the GPU, 2 pretended",
        "x:1: 0 on the GPU, 1 pretended",
    ]
