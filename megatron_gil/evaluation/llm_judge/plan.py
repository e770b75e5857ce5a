"""Which questions a set of comparisons comes to: identical responses to none, repeated comparisons to the same two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_gil.evaluation.comparisons import Comparison
from megatron_gil.evaluation.llm_judge.prompts import Question, instruction_of, pose
from megatron_gil.evaluation.rubrics import Rubric


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    keys: dict[Comparison, tuple[str, str]]
    """Of every comparison once, identical ones left out: the question with ours first, and with theirs first."""
    questions: dict[str, Question]
    num_rows: int
    num_identical: int

    @property
    def num_repeated(self) -> int:
        return self.num_rows - self.num_identical - len(self.keys)


def plan_questions(comparisons: Sequence[Comparison], model: str, rubric: Rubric) -> Plan:
    instruction = instruction_of(rubric)
    keys: dict[Comparison, tuple[str, str]] = {}
    questions: dict[str, Question] = {}
    for comparison in _once(comparisons):
        ours_first = pose(model, instruction, comparison.prompt, comparison.ours, comparison.theirs)
        theirs_first = pose(model, instruction, comparison.prompt, comparison.theirs, comparison.ours)
        keys[comparison] = (ours_first.key, theirs_first.key)
        questions |= {question.key: question for question in (ours_first, theirs_first)}
    return Plan(
        keys=keys,
        questions=questions,
        num_rows=len(comparisons),
        num_identical=sum(comparison.is_identical for comparison in comparisons),
    )


def _once(comparisons: Iterable[Comparison]) -> list[Comparison]:
    return [comparison for comparison in dict.fromkeys(comparisons) if not comparison.is_identical]
