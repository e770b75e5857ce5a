"""The decoder against the trainer's model, and what a step may cost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gil.config import SamplingSection
from megatron_gil.engine.decoder import Decoder
from megatron_gil.engine.decoder_weights import collect_weights
from megatron_gil.engine.generation import Generator
from megatron_gil.engine.slots import STEPS, Answers, Slots
from megatron_gil.models.heads import output_weight
from megatron_gil.parallel.layout import ParallelLayout
from megatron_gil.types import PromptBatch
from tests.models.tiny import SIZES, VARIANTS, make_model, sample_tokens
from tests.ranks import run_ranks
from tests.training.running import ONE, PP2, TP2, TP2_PP2, build, layout_name, parallel, world_size

LENGTHS, NUM_NEW = (9, 3, 1, 7), 6  # of the prompts, and the tokens fed after them


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llamas")
    for name, sizes in VARIANTS.items():
        make_model(root / name, **sizes)
    return root


def _whole(root: Path, name: str, layout: ParallelLayout, dtype: torch.dtype) -> Tensor:
    """The trainer's logits [4, 15, V]."""
    model, tokens = build(root / name, layout, "lm", dtype=dtype).module.eval(), sample_tokens(4, 15)
    packed = tokens.reshape(1, -1)
    hidden = model(packed, packed, torch.arange(tokens.numel()).view(tokens.shape))
    return (hidden @ output_weight(model).T)[0, :, : SIZES["vocab_size"]].unflatten(0, tokens.shape)


def _decode(root: Path, name: str, layout: ParallelLayout, dtype: torch.dtype) -> Tensor:
    """The decoder's logits [4, NUM_NEW, V] of each row's positions from its prompt's last, in other slots than rows;
    slot 0 is idle, and slot 1's prompt is a copy of slot 3's."""
    model, tokens, lengths = build(root / name, layout, "lm", dtype=dtype), sample_tokens(4, 15), torch.tensor(LENGTHS)
    decoder = Decoder(collect_weights(model), model.spec, layout, num_slots=6, num_columns=32)
    slots = torch.tensor([3, 2, 5, 4])
    padded = torch.where(torch.arange(8) < lengths[:, None] - 1, tokens[:, :8], 0)
    decoder.prefill(padded[:1], slots[:1])
    decoder.prefill(padded[1:], slots[1:])
    decoder.copy(torch.tensor([3]), torch.tensor([1]), 8)
    rows = torch.tensor([0, 1, 2, 3, 0])
    slots = torch.cat([slots, torch.tensor([1])])
    decoder.show(slots, lengths[rows] - 1)
    found = []
    for step in range(NUM_NEW):
        places = lengths[rows] - 1 + step
        decoder.position.index_copy_(0, slots, places)
        decoder.newest.index_copy_(0, slots, tokens[rows, places])
        found.append(decoder.step(16)[slots])
    logits = torch.stack(found, 1)
    assert torch.equal(logits[0], logits[4]), "a copied prompt is not the prompt"
    return logits[:4]


def _compare(layout: dict[str, Any], root: Path, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor | None]]:
    with parallel(layout) as started, torch.no_grad():
        alone = started.world_size == 1
        return {
            name: (_decode(root, name, started, dtype), _whole(root, name, started, dtype) if alone else None)
            for name in VARIANTS
        }


@pytest.fixture(scope="module")
def one(llamas: Path) -> dict[str, tuple[Tensor, Tensor | None]]:
    return run_ranks(_compare, 1, ONE, llamas, torch.float64)[0]


@pytest.mark.parametrize("layout", [ONE, TP2, PP2, TP2_PP2], ids=layout_name)
def test_every_option_of_a_spec_is_the_trainers(layout: dict[str, Any], llamas: Path, one: dict[str, Any]) -> None:
    for rank in [one] if layout == ONE else run_ranks(_compare, world_size(layout), layout, llamas, torch.float64):
        for name, (found, _) in rank.items():
            expected = _fed(one[name][1])
            assert expected.abs().max() > 2, "the comparison is of numbers too small to mean anything"
            # float64 sums in another order
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_is_as_near_to_float64_as_the_trainers(llamas: Path, one: dict[str, Any]) -> None:
    for name, (found, whole) in run_ranks(_compare, 1, ONE, llamas, torch.bfloat16)[0].items():
        assert found.dtype == torch.float32
        exact = one[name][1]
        ours, theirs = ((logits.double() - _fed(exact)).square().mean().sqrt() for logits in (found, _fed(whole)))
        assert ours < 1.3 * theirs, (name, ours, theirs)  # both are rounding; over 1464 numbers it averages out


def _fed(whole: Tensor) -> Tensor:
    """The positions that `_decode` feeds."""
    return torch.stack([whole[row, length - 1 : length - 1 + NUM_NEW] for row, length in enumerate(LENGTHS)])


def _see_from_behind(root: Path) -> bool:
    """Whether a slot sees a column whose row has ended far behind those that the others attend."""
    with parallel(ONE) as layout, torch.no_grad():
        model = build(root / "mistral", layout, "lm")
        decoder = Decoder(collect_weights(model), model.spec, layout, num_slots=2, num_columns=64)
        slots, places = torch.tensor([1]), torch.tensor([40])
        decoder.position.index_copy_(0, slots, places)
        decoder.show(slots, places)
        return bool((decoder._seen(decoder.position[:, None], 16) == 0).any(-1).all())


def test_a_slot_that_has_ended_sees_a_column(llamas: Path) -> None:
    """Some kernels answer a row of scores that sees nothing with NaN, which would stay in the cache."""
    assert run_ranks(_see_from_behind, 1, llamas) == [True]


class _Operations(TorchDispatchMode):
    """Counts every operation, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _count_operations(root: Path, family: str) -> list[Counter[str]]:
    """Of a step that has been done before, in the model and in the same with twice the layers."""
    counts = []
    with parallel(ONE) as layout, torch.no_grad():
        for name in (f"{family}2", f"{family}4"):
            model = build(root / name, layout, "lm")
            decoder = Decoder(collect_weights(model), model.spec, layout, num_slots=6, num_columns=32)
            decoder.step(32)
            with _Operations() as operations:
                decoder.step(32)
            counts.append(operations.counts)
    return counts


@pytest.mark.parametrize(("family", "limit"), [("Llama", 24), ("Mistral", 24), ("Qwen2", 24), ("Qwen3", 36)])
def test_a_layer_takes_few_operations(family: str, limit: int, tmp_path: Path) -> None:
    for num_layers in (2, 4):
        make_model(tmp_path / f"{family}{num_layers}", family=family, num_hidden_layers=num_layers)
    two, four = run_ranks(_count_operations, 1, tmp_path, family)[0]
    more = four - two
    print(more)
    assert more.total() / 2 <= limit, more


class _HostReads:
    """Counts what makes the host wait for a tensor's numbers."""

    NAMES = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in self.NAMES:
            patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, original: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        return read


class NoEnd:
    pad_id = 0
    eos_ids: tuple[int, ...] = (2,)


def _prompts(num_rows: int, repeats: int = 1) -> PromptBatch:
    """Of 3 to 6 tokens."""
    rows = torch.arange(num_rows)
    return PromptBatch(
        tokens=sample_tokens(num_rows, 6)[rows // repeats],
        lengths=3 + rows // repeats % 4,
        row_ids=rows,
        sample_ids=rows,
        known_groups=torch.full((num_rows,), -1),
    )


def _count_reads(root: Path) -> tuple[list[int], int]:
    """Of each round of 16 steps with every option of sampling on; and of the steps alone."""
    section = SamplingSection(
        max_new_tokens=3 * STEPS, min_new_tokens=3 * STEPS, temperature=0.7, top_k=9, top_p=0.9, repetition_penalty=1.1
    )
    reads = []
    with parallel(ONE) as layout, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        model, prompts = build(root / "tied", layout, "lm"), _prompts(4)
        answers = Answers(prompts, torch.rand(4, section.max_new_tokens), NoEnd.pad_id)
        decoder = Decoder(collect_weights(model), model.spec, layout, num_slots=4, num_columns=128)
        slots = Slots(decoder, prompts, answers, section, eos_ids=NoEnd.eos_ids, capture=False)
        slots.advance()
        host = _HostReads(patch)
        while slots.busy:
            before = host.count
            slots.advance()
            reads.append(host.count - before)
        before = host.count
        slots._choose(64)
        return reads, host.count - before


def test_the_host_reads_once_in_sixteen_steps(llamas: Path) -> None:
    assert run_ranks(_count_reads, 1, llamas)[0] == ([1, 1], 0)


def _count_prefills(root: Path) -> tuple[int, int]:
    """Prompts read where every prompt is answered three times, in as many slots as rows and in four."""
    counts = []
    with parallel(ONE) as layout:
        model, original = build(root / "tied", layout, "lm"), Decoder.prefill
        rollouts = []
        for size in (15, 4):
            read = []

            def prefill(self: Decoder, tokens: Tensor, slots: Tensor, read: list[int] = read) -> None:
                read.append(len(slots))
                original(self, tokens, slots)

            section = SamplingSection(max_new_tokens=8, micro_size=size)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Decoder, "prefill", prefill)
                rollouts.append(Generator(model, section, tokenizer=NoEnd(), seed=1).sample(_prompts(15, repeats=3)))
            counts.append(sum(read))
        assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
        return counts[0], counts[1]


def test_responses_to_one_prompt_share_its_prefill(llamas: Path) -> None:
    """With fewer slots than rows too: a slot that still holds the prompt is copied."""
    assert run_ranks(_count_prefills, 1, llamas)[0] == (5, 5)
