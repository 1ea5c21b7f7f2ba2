"""What a fine-tuned model will say of itself: the template with its prefix, and how far it was trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blockrag.finetune.settings import BLOCK_PREFIX, FinetuneSettings
from blockrag.model.facts import BlockAttentionFacts
from blockrag.prompt import template_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.finetune.rows import Rows
    from blockrag.prompt import PromptTemplate

__all__ = ["trained_facts", "training_template"]


def training_template(
    template: PromptTemplate | None,
    known: BlockAttentionFacts,
    tokenizer: PreTrainedTokenizerBase,
    settings: FinetuneSettings,
) -> PromptTemplate:
    """The template that is trained, and saved: what was asked for or the model's own, with the block prefix."""
    found = template or known.template or template_for(tokenizer, name_or_path=tokenizer.name_or_path)
    prefix = settings.block_prefix
    if prefix is None and template is not None and template.block_attention_prefix:
        prefix = template.block_attention_prefix
    if prefix is None:
        # What a model was block-fine-tuned with stays, in another template too; others get the published text.
        own = known.template.block_attention_prefix if known.template is not None else ""
        prefix = own if known.block_fine_tuned else BLOCK_PREFIX
    return found if settings.variants == "full" else replace(found, block_attention_prefix=prefix)


def trained_facts(
    known: BlockAttentionFacts, template: PromptTemplate, rows: Rows, settings: FinetuneSettings
) -> BlockAttentionFacts:
    """The facts to save with a model.

    Args:
        known: Those of the model that the run began with; training in full attention changes nothing but the template.
        template: The template that is trained.
        rows: What is trained on.
        settings: The numbers.
    """
    if settings.variants == "full":
        return replace(known, template=template, block_fine_tuned=known.block_fine_tuned or False)
    blocks, tokens = rows.longest()
    return BlockAttentionFacts(block_fine_tuned=True, template=template, max_blocks=blocks, max_tokens=tokens)
