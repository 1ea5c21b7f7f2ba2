"""The fields by which a component names the language model whose KV states it handles.

They are those of `BlockRAGLLM`, and must be equal to the ones of the model that will answer: components with equal
values share one model and one block store per process.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.llms.blockrag.nodes import PromptForm
from llama_index.llms.blockrag.plain_fields import PlainFields

from blockrag.errors import InputError
from blockrag.model.config import DEFAULT_STORE, ModelConfig

if TYPE_CHECKING:
    from llama_index.llms.blockrag.base import BlockRAGLLM
    from typing_extensions import Self

    from blockrag.model.block_model import BlockModel

__all__ = ["ModelFields", "config_of", "fields_of"]


class ModelFields(PlainFields):
    """Plain configuration of a shared language model."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model_name: str | None = Field(default=None, description='Directory or hub id of the language model, or "demo".')
    store_url: str | None = Field(
        default=None, description="Where KV states are kept, as blockrag.open_store takes it; 2 GiB of memory if None."
    )
    prompt_form: PromptForm = Field(default="chat", description="How the language model shows passages.")
    device: str = Field(default="auto", description='Torch device, or "auto".')
    dtype: str = Field(default="auto", description='Torch dtype, or "auto".')
    attention: Literal["block", "full"] = Field(default="block", description="Attention of the language model.")
    precision: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = Field(
        default=None, description="Precision of stored KV states; None leaves it to the model."
    )
    block_fine_tuned: bool | None = Field(default=None, description="Whether the model was block-fine-tuned.")
    namespace: str = Field(default="", description="Keeps the blocks of tenants apart.")

    @classmethod
    def for_llm(cls, llm: BlockRAGLLM, **fields: Any) -> Self:
        """The component for this language model: what names the model is taken from it.

        Args:
            llm: The language model that will answer.
            **fields: The component's other fields.
        """
        return cls(**{name: getattr(llm, name) for name in ModelFields.model_fields}, **fields)

    def shared_model(self) -> BlockModel:
        """The model these fields name, loaded by the first component that asks.

        Raises:
            InputError: It cannot be loaded.
            UnsupportedModelError: It cannot be composed exactly.
            StoreError: The store's directory cannot be used.
        """
        from blockrag.model.shared import shared_model

        return shared_model(config_of(self))


def config_of(component: ModelFields | BlockRAGLLM) -> ModelConfig:
    """The model a component's fields name.

    Raises:
        InputError: They name none.
    """
    if component.model_name is None:
        raise InputError(f"{type(component).__name__} has no model_name; pass the language model's")
    return ModelConfig(
        model=component.model_name,
        store=component.store_url or DEFAULT_STORE,
        device=component.device,
        dtype=component.dtype,
        attention=component.attention,
        precision=component.precision,
        block_fine_tuned=component.block_fine_tuned,
        namespace=component.namespace,
    )


def fields_of(config: ModelConfig) -> dict[str, Any]:
    """The fields that name the model of a configuration."""
    fields = asdict(config)
    return {"model_name": fields.pop("model"), "store_url": fields.pop("store"), **fields}
