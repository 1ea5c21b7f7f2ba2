"""Nodes as passages and back, and the blocks they become.

A node is kept whole, as the JSON LlamaIndex itself stores, in the passage's metadata; nothing is written into the
node's own. Short strings of its metadata lie beside it, where the index can look them up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from llama_index.core.constants import DATA_KEY, TYPE_KEY
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.storage.docstore.utils import json_to_doc
from llama_index.llms.blockrag.blocks import excerpt_of

from blockrag.errors import InputError
from blockrag.passage import Passage

if TYPE_CHECKING:
    from blockrag.model.block_model import BlockModel
    from blockrag.prompt import Block

__all__ = ["PromptForm", "facts_of", "node_blocks", "node_of", "passage_of"]

PromptForm = Literal["chat", "rag"]
"""How the language model shows passages: as they are, or in the form it was block-fine-tuned on."""

_NODE, _TYPE, _FACT = "node", "type", "metadata."
# Long strings (the window around a sentence, say) are content rather than something to look up.
_FACT_CHARACTERS = 256


def passage_of(node: BaseNode) -> Passage:
    """The passage that stands for a node; its vector is left out.

    Raises:
        InputError: The node's id is empty, a string holds a lone surrogate, or its metadata has no JSON form.
    """
    try:
        data = json.loads(node.model_copy(update={"embedding": None}).to_json())
    except TypeError as error:
        raise InputError(
            f"node {node.node_id!r} cannot be kept: {error}; turn such values of its metadata into strings or numbers"
        ) from error
    text = node.get_content(metadata_mode=MetadataMode.NONE)
    if data.get("text") == text:
        data["text"] = None
    return Passage(
        id=node.node_id,
        text=text,
        document_id=node.ref_doc_id or node.node_id,
        # A string, because its keys' order, which the model sees, must survive.
        metadata={_NODE: json.dumps(data), _TYPE: node.get_type(), **facts_of(node.metadata)},
    )


def node_of(passage: Passage) -> BaseNode:
    """The node a passage stands for, without its embedding."""
    data = json.loads(str(passage.metadata[_NODE]))
    if "text" in data and data["text"] is None:
        data["text"] = passage.text
    return json_to_doc({DATA_KEY: data, TYPE_KEY: passage.metadata[_TYPE]})


def facts_of(metadata: Mapping[str, object]) -> dict[str, str]:
    """What the index can look up of a node's metadata (or of a filter's values), by the names it has there."""
    return {
        f"{_FACT}{name}": value
        for name, value in metadata.items()
        if isinstance(value, str) and len(value) <= _FACT_CHARACTERS
    }


def node_blocks(model: BlockModel, nodes: Sequence[BaseNode], prompt_form: PromptForm) -> list[Block]:
    """The block of each node, exactly as the language model's prompts in that form hold it.

    Raises:
        PromptError: A text cannot be tokenized.
    """
    from blockrag.prompt.chat import excerpt_blocks

    excerpts = [excerpt_of(node) for node in nodes]
    if prompt_form == "rag":
        return model.template.passage_blocks(model.tokenizer, [excerpt.passage for excerpt in excerpts])
    return excerpt_blocks(model.tokenizer, [excerpt.text for excerpt in excerpts])
