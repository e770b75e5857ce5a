"""Responses that are said to several prompts, found by codes of their tokens, are those that a plain loop finds."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from megatron_gil.parallel.collectives import all_sum
from megatron_gil.training.ppo.duplicates import repeats_another, response_codes
from megatron_gil.types import Rollout
from tests.ranks import run_ranks
from tests.training.running import DP2, TP2, parallel


def _rollout(responses: list[list[int]], row_ids: list[int]) -> Rollout:
    """Prompts of lengths 1, 2, 3, ... with those responses."""
    width = 12
    prompt_lengths = torch.arange(1, len(responses) + 1)
    tokens = torch.zeros(len(responses), width, dtype=torch.long)
    for row, response in enumerate(responses):
        tokens[row, : row + 1] = 50 + row
        tokens[row, row + 1 : row + 1 + len(response)] = torch.tensor(response)
    lengths = prompt_lengths + torch.tensor([len(response) for response in responses])
    others: Any = dict.fromkeys(("response_mask", "sampled_log_probs", "finished", "sample_ids", "known_groups"))
    return Rollout(
        tokens=tokens, lengths=lengths, prompt_lengths=prompt_lengths, row_ids=torch.tensor(row_ids), **others
    )


RESPONSES = [[1, 2, 3], [1, 2, 3], [3, 2, 1], [1, 2], [1, 2], [1, 2, 3]]
ROW_IDS = [7, 8, 9, 4, 4, 7]
"""[1, 2, 3] answers prompts 7 (twice) and 8; [1, 2] answers prompt 4 twice, which is no duplicate."""
REPEATED = [True, True, False, False, False, True]


def _oracle(responses: list[list[int]], row_ids: list[int]) -> list[bool]:
    rows = list(zip(responses, row_ids, strict=True))
    return [any(mine == other and a != b for other, b in rows) for mine, a in rows]


def _alone(rollout: Rollout) -> list[bool]:
    return repeats_another(rollout, dp_rank=0, dp_size=1, all_sum=torch.clone).tolist()


def test_the_rows_that_repeat_another_are_those_of_a_plain_loop() -> None:
    assert _alone(_rollout(RESPONSES, ROW_IDS)) == _oracle(RESPONSES, ROW_IDS) == REPEATED
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        lengths = torch.randint(0, 4, (9,), generator=generator).tolist()
        responses = [torch.randint(0, 2, (length,), generator=generator).tolist() for length in lengths]
        row_ids = torch.randint(0, 5, (9,), generator=generator).tolist()
        assert _alone(_rollout(responses, row_ids)) == _oracle(responses, row_ids)


def test_no_two_short_responses_share_a_code() -> None:
    """All 5 + 25 + 125 + 625 of one to four tokens, among them 0 (as padding is) and a large one."""
    tokens: tuple[int, ...] = (0, 1, 2, 3, 2**18)
    responses: list[list[int]] = [list(found) for length in range(1, 5) for found in product(tokens, repeat=length)]
    codes = [int(response_codes(_rollout([response], [0]))) for response in responses]
    assert len(set(codes)) == len(responses) == 780


def _flags(layout: dict[str, Any]) -> list[bool]:
    with parallel(layout) as started:
        mine = slice(started.dp_rank, None, started.dp_size)
        rollout = _rollout(RESPONSES[mine], ROW_IDS[mine])
        ranks = {"dp_rank": started.dp_rank, "dp_size": started.dp_size}
        return repeats_another(rollout, **ranks, all_sum=all_sum(started)).tolist()


@pytest.mark.parametrize(("layout", "parts"), [(DP2, 2), (TP2, 1)])
def test_responses_are_compared_over_all_ranks(layout: dict[str, Any], parts: int) -> None:
    for rank, found in enumerate(run_ranks(_flags, 2, layout)):
        assert found == REPEATED[rank % parts :: parts]
