"""Judges that score. The language model: test_llm_judge*.py."""

import pytest

from megatron_gil.config import ConfigError
from megatron_gil.evaluation.judge import ScoreJudge, recorded_scores


def length_judge(tie_margin: float = 0.0) -> ScoreJudge:
    return ScoreJudge("length", lambda prompt, response: float(len(response)), tie_margin=tie_margin)


def test_score_judge() -> None:
    judge = length_judge(tie_margin=1.0)
    assert judge.compare("p", "long one", "short") == "win"
    assert judge.compare("p", "short", "long one") == "lose"
    assert judge.compare("p", "four", "fives") == "tie"


def test_recorded_scores() -> None:
    score = recorded_scores([{"prompt": "p", "response": "r", "score": 1.5}], "f.jsonl")
    assert score("p", "r") == 1.5
    with pytest.raises(ConfigError, match=r"f\.jsonl: no score for the response 'other'"):
        score("p", "other")
    with pytest.raises(ConfigError, match='row 1 has no number "score"'):
        recorded_scores([{"prompt": "p", "response": "r"}], "f.jsonl")
