"""`PassageBlock`: one retrieved passage inside a chat message.

To every other language model it is a text block and nothing else (`block_type` stays "text"), so that a pipeline that
makes such blocks can change its model. What is serialized (a memory, a `model_dump`) comes back as a plain text block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_index.core.base.llms.types import TextBlock
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from blockrag.passage import Passage
from blockrag.prompt.message import Excerpt

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PassageBlock", "excerpt_of"]


class PassageBlock(TextBlock):
    """A passage as the model is to see it.

    Args:
        text: What the chat form shows: the passage as stock synthesizers show it, metadata included.
        node_id: The node it was made from.
        title: Its title, for the RAG form.
        score: The retriever's score, if there is one.
        content: The passage without metadata, for the RAG form; by default `text`.
    """

    node_id: str | None = None
    title: str | None = None
    score: float | None = None
    content: str | None = None

    @classmethod
    def from_node(cls, hit: NodeWithScore | BaseNode) -> Self:
        """The block of a retrieved node: its text is what stock synthesizers show."""
        node, score = (hit.node, hit.score) if isinstance(hit, NodeWithScore) else (hit, None)
        return cls(
            text=node.get_content(metadata_mode=MetadataMode.LLM).strip(),
            node_id=node.node_id,
            title=_title(node),
            score=score,
            content=node.get_content(metadata_mode=MetadataMode.NONE),
        )

    def excerpt(self) -> Excerpt:
        """The passage for blockrag's prompts."""
        text = self.text if self.content is None else self.content
        return Excerpt(self.text, Passage(id=self.node_id or "passage", text=text, title=self.title or ""))


def excerpt_of(node: BaseNode) -> Excerpt:
    """A node as stock synthesizers show it, and the passage it holds."""
    return PassageBlock.from_node(node).excerpt()


def _title(node: BaseNode) -> str:
    title = node.metadata.get("title")
    return title if isinstance(title, str) else ""
