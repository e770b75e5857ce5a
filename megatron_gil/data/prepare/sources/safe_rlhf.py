"""PKU-SafeRLHF: {"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_gil.data.prepare.sources.example import Example, Origin, Tally, as_pair, as_prompt, as_response, texts_of


def read_safe_rlhf(row: Mapping[str, Any], origin: Origin, tally: Tally) -> Example | None:
    """The preference follows one of the two verdicts. The preferred response is the demonstration too if it is safe."""
    texts = texts_of(row, "prompt", "response_0", "response_1")
    if texts is None or not texts[0].strip():
        return tally.drop("no prompt with two responses")
    prompt = as_prompt(texts[0])
    named = row.get(f"{origin.safe_rlhf_label}_response_id")
    verdict = next((i for i in (0, 1) if named in (i, str(i))), None)
    if verdict is None:
        tally.drop("no verdict", "preferences")
        return Example(prompt=prompt)
    if row.get("better_response_id") != row.get("safer_response_id"):
        tally.note("the better response is not the safer one")
    responses = [as_response(text, tally) for text in texts[1:]]
    chosen, rejected = as_pair(responses[verdict], responses[1 - verdict], tally)
    completion = responses[verdict]
    if completion is None or row.get(f"is_response_{verdict}_safe") is False:
        tally.drop("the preferred response is empty or marked unsafe", "demonstrations")
        completion = None
    return Example(prompt=prompt, completion=completion, chosen=chosen, rejected=rejected)
