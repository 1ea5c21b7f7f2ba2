"""Prompts beyond what the model was block-fine-tuned on are answered, and said once."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from blockrag import BeyondTrainingWarning, BlockModel, GenerationOptions, Passage

FEW = GenerationOptions(max_new_tokens=2)


@pytest.fixture
def model() -> BlockModel:
    loaded = BlockModel.from_pretrained("demo", device="cpu")
    facts = replace(loaded.facts, max_blocks=3, max_tokens=120)
    return BlockModel(loaded.model, loaded.tokenizer, facts=facts)


def prompt(model: BlockModel, passages: int, words: int = 3):
    shown = [Passage(id=str(n), title="T", text=f"{n} " + "word " * words) for n in range(passages)]
    return model.template.segment(model.tokenizer, passages=shown, question="What?")


def test_more_blocks_than_trained_are_said_once(model: BlockModel) -> None:
    with pytest.warns(BeyondTrainingWarning, match="4 blocks; .* on at most 3"):
        model.generate(prompt(model, 3), FEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(prompt(model, 4), FEW)
        model.generate([prompt(model, 3), prompt(model, 4)], FEW)


def test_more_tokens_than_trained_are_said(model: BlockModel) -> None:
    with pytest.warns(BeyondTrainingWarning, match="tokens; .* on at most 120"):
        model.generate(prompt(model, 2, words=60), FEW)


def test_conversations_count_all_their_blocks(model: BlockModel) -> None:
    running = model.start()
    running.extend(prompt(model, 2).blocks, room=2)
    with pytest.warns(BeyondTrainingWarning, match="5 blocks"):
        running.extend(prompt(model, 1).blocks, room=2)
    running.close()


def test_nothing_is_said_within_the_range_under_full_attention_or_of_an_unknown_range(model: BlockModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(prompt(model, 2), FEW)
        model.generate(prompt(model, 6, words=40), FEW, attention="full")
        unknown = replace(model.facts, max_blocks=None, max_tokens=None)
        BlockModel(model.model, model.tokenizer, facts=unknown).generate(prompt(model, 6, words=40), FEW)
