"""Training and inference agree: the logits a sample is trained with are those it will be answered with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import CASES, LONG_CASES, tiny_model
from tiny_tokenizers import plain_tokenizer
from tiny_training import PREFIXED, every_kind, rag_line, samples_from

from blockrag.finetune.collate import collate, layout_of, spans_of
from blockrag.finetune.data.lines import BlocksLine, ChatLine, Line, RagLine
from blockrag.finetune.rows import Item, Rows
from blockrag.model.block_model import Attention, BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.loading import load_pretrained
from blockrag.model.masks import mask_argument
from blockrag.model.profile import structure_of
from blockrag.prompt import TEMPLATES, Block, PromptTemplate, SegmentedPrompt
from blockrag.stores import MemoryStore

TOLERANCE = 1e-5
TINY = {case.id: case for case in [*CASES, *LONG_CASES]}
# Grouped queries; norms of queries and keys; windows in some layers and two frequencies; windows in all layers; eager
# attention with sinks; eager with a soft cap; layers without positions; what turns in the values.
FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "gpt-oss", "gemma2", "smollm3", "deepseek-v3"]
PREFIXED_PLAIN = replace(TEMPLATES["plain"], block_attention_prefix=PREFIXED)

Asked = tuple[SegmentedPrompt, str]


def asked_of(line: Line, template: PromptTemplate, tokenizer: object) -> list[Asked]:
    """What inference would be asked for a line, and the answer, question by question: not through `finetune`."""
    if isinstance(line, RagLine):
        passages = [one.passage for one in line.passages]
        return [
            (template.segment(tokenizer, passages=passages, question=asked.question), asked.target)
            for asked in line.questions
        ]
    if isinstance(line, BlocksLine):
        return [(template.segment_blocks(tokenizer, line.blocks, allow_special=True), line.response)]
    assert isinstance(line, ChatLine)
    return [
        (template.segment_messages(tokenizer, line.messages[:number]), message["content"])
        for number, message in enumerate(line.messages)
        if message["role"] == "assistant"
    ]


def trained_logits(
    model: object, rows: Sequence[tuple[Item, ...]], *, positions: str = "global", pad_id: int = 0
) -> list[torch.Tensor]:
    """Logits (answer tokens, vocabulary) that predict each answer of some rows, in one training forward."""
    batch = collate(rows, pad_id=pad_id, positions=positions)
    layout = layout_of(batch)
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=mask_argument(model, structure_of(model), layout),
            use_cache=False,
        ).logits
    return [logits[span.row, span.start - 1 : span.end - 1] for span in spans_of(rows)]


def inferred_logits(
    model: BlockModel, prompt: SegmentedPrompt, answer: Sequence[int], attention: Attention, *, reencode: bool = True
) -> torch.Tensor:
    """The same through the composed path: behind the query block, then behind each token of the answer."""
    blocks = prompt.blocks if attention == "block" else prompt.as_full().blocks
    running = model.start(attention=attention, reencode=reencode)
    try:
        running.extend(blocks, room=len(answer) + 8)
        found = [running.logits]
        for token in answer[:-1]:
            running.extend([Block(token_ids=(token,), text="", local=False, kind="answer")], room=8)
            found.append(running.logits)
        return torch.stack(found).float()
    finally:
        running.close()


def assert_agrees(
    trained: object,
    model: BlockModel,
    lines: Sequence[Line],
    rows: Sequence[tuple[Item, ...]],
    *,
    positions: str = "global",
    relative: bool = False,
) -> None:
    """Compare every answer of the rows, whose items are those of the lines in order, each in its attention."""
    found = iter(trained_logits(trained, rows, positions=positions))
    asked = iter([one for line in lines for one in asked_of(line, model.template, model.tokenizer)])
    count = 0
    for item in (item for row in rows for item in row):
        for _ in item.sample.branches:
            prompt, text = next(asked)
            answer = model.template.answer_block(model.tokenizer, text).token_ids
            expected = inferred_logits(model, prompt, answer, item.attention, reencode=positions == "global")
            logits = next(found)
            assert logits.shape == expected.shape
            difference = float((logits - expected).abs().max())
            scale = float(expected.abs().max()) if relative else 1.0
            assert difference <= TOLERANCE * scale, f"{difference:.1e} on logits of scale {expected.abs().max():.1f}"
            count += 1
    assert next(found, None) is None
    assert next(asked, None) is None
    assert count


def block_model(model: object, template: PromptTemplate) -> BlockModel:
    return BlockModel(
        model,
        plain_tokenizer(),
        template=template,
        store=MemoryStore(),
        precision="float32",
        facts=BlockAttentionFacts(block_fine_tuned=True),
        kept_bytes=0,
    )


def items_of(tmp_path: Path, lines: Sequence[Line], template: PromptTemplate, attention: Attention) -> list[Item]:
    samples = samples_from(tmp_path, lines, plain_tokenizer(), template)
    rows = Rows(samples, variants=attention, order="file")
    return [item for row in rows for item in row]


@pytest.mark.parametrize("attention", ["block", "full"])
@pytest.mark.parametrize("template", [TEMPLATES["plain"], PREFIXED_PLAIN], ids=["plain", "prefixed"])
def test_every_kind_of_line(tmp_path: Path, template: PromptTemplate, attention: Attention) -> None:
    """Rows of different lengths, so that all but one are padded; chats and ready blocks, with and without blocks."""
    lines = every_kind()
    rows = [(item,) for item in items_of(tmp_path, lines, template, attention)]
    assert_agrees(tiny_model(TINY["llama"]), block_model(tiny_model(TINY["llama"]), template), lines, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_packed_and_padded(tmp_path: Path, family: str) -> None:
    """A row of several samples in both attentions, several branches each, beside a shorter row."""
    lines: list[Line] = [rag_line(number, passages=number % 4, questions=1 + number % 3) for number in range(6)]
    block = items_of(tmp_path, lines, PREFIXED_PLAIN, "block")
    full = items_of(tmp_path, lines, PREFIXED_PLAIN, "full")
    items = [block[0], full[1], block[2], full[3], block[4], full[5]]
    model = block_model(tiny_model(TINY[family]), PREFIXED_PLAIN)
    assert_agrees(tiny_model(TINY[family]), model, lines, [tuple(items[:4]), tuple(items[4:])])


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_positions_that_begin_anew_are_those_without_re_encoding(tmp_path: Path, family: str) -> None:
    lines: list[Line] = [rag_line(1, passages=3), rag_line(2, passages=2)]
    rows = [tuple(items_of(tmp_path, lines, PREFIXED_PLAIN, "block"))]
    trained, model = tiny_model(TINY[family]), block_model(tiny_model(TINY[family]), PREFIXED_PLAIN)
    assert_agrees(trained, model, lines, rows, positions="local")
    usual = trained_logits(trained, rows)
    moved = trained_logits(trained, rows, positions="local")
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(usual, moved, strict=True))


@pytest.mark.parametrize("attention", ["block", "full"])
def test_the_demo_model(tmp_path: Path, attention: Attention) -> None:
    trained, tokenizer, facts = load_pretrained("demo", device=torch.device("cpu"), dtype=torch.float32, revision=None)
    model = BlockModel.from_pretrained("demo", dtype="float32", precision="float32", kept_bytes=0)
    assert facts.template is not None
    lines: list[Line] = [rag_line(3, passages=4, questions=3), rag_line(4, passages=2)]
    samples = samples_from(tmp_path, lines, tokenizer, facts.template)
    rows = [tuple(item for row in Rows(samples, variants=attention, order="file") for item in row)]
    # Trained weights, logits up to 16: float32 itself is 1e-4 away from float64 here, by either path.
    assert_agrees(trained, model, lines, rows, relative=True)


def test_gaps_change_positions_and_nothing_else(tmp_path: Path) -> None:
    """What a gap leaves out is left out behind its block; block attention inside of a block does not notice."""
    (item,) = items_of(tmp_path, [rag_line(1, passages=2, questions=1)], PREFIXED_PLAIN, "block")
    usual = collate([(item,)], pad_id=0)
    moved = collate([(replace(item, gaps=(3, 0, 40)),)], pad_id=0)
    shift = (moved["position_ids"] - usual["position_ids"])[0].tolist()
    first, second, third = map(len, item.sample.blocks)
    rest = len(shift) - first - second - third
    assert shift == [0] * first + [3] * (second + third) + [43] * rest
    assert torch.equal(moved["position"], moved["position_ids"])
    for name in usual.keys() - {"position_ids", "position"}:
        assert torch.equal(usual[name], moved[name])


def test_another_mask_would_be_noticed(tmp_path: Path) -> None:
    """The comparison can fail: the same rows under the other attention are far off."""
    lines: list[Line] = [rag_line(1, passages=3)]
    items = items_of(tmp_path, lines, TEMPLATES["plain"], "block")
    model = block_model(tiny_model(TINY["llama"]), TEMPLATES["plain"])
    wrong = [(replace(items[0], attention="full"),)]
    (prompt, text), *_ = asked_of(lines[0], model.template, model.tokenizer)
    answer = model.template.answer_block(model.tokenizer, text).token_ids
    expected = inferred_logits(model, prompt, answer, "block")
    assert (trained_logits(tiny_model(TINY["llama"]), wrong)[0] - expected).abs().max() > 1e-3
