"""Models to measure with: the shapes of real models with random weights, or anyone's checkpoint.

How long a forward takes does not depend on what the weights are, so nothing needs to be downloaded. The numbers of
each shape are those of the published configuration it is named after; `tiny-15m` and `100m` are small Llama shapes
that a laptop runs in seconds, `smoke` only shows that a benchmark runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from blockrag.errors import InputError
from blockrag.model.block_model import BlockModel
from blockrag.model.device_pool import DevicePool
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.loading import resolve_device, resolve_dtype
from blockrag.prompt import TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.codec import Precision
    from blockrag.kv import KVLayout
    from blockrag.model.profile import ModelProfile

__all__ = ["SHAPES", "Subject", "SubjectSpec"]

_CONTROL = ("<pad>", "<bos>", "<eos>")


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama(**numbers: Any) -> Callable[[], PreTrainedModel]:
    return lambda: LlamaForCausalLM(LlamaConfig(**numbers))


def _qwen3(**numbers: Any) -> Callable[[], PreTrainedModel]:
    return lambda: Qwen3ForCausalLM(Qwen3Config(**numbers))


SHAPES: dict[str, Callable[[], Any]] = {
    "smoke": _llama(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=True,
    ),
    "tiny-15m": _llama(
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=32000,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    ),
    "100m": _llama(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": _llama(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters=_llama3_rope(32.0),
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": _qwen3(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters=_llama3_rope(8.0),
        tie_word_embeddings=False,
    ),
}
"""Name to a function that builds the model on torch's default device, in torch's default dtype."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    Args:
        model: A model that can be composed; it keeps no finished prompts, which would hide what composing costs.
        name: The shape's name, or the checkpoint's without its directory.
        random_weights: Whether it is a shape.
    """

    model: BlockModel
    name: str
    random_weights: bool

    @property
    def device(self) -> str:
        """The kind of device, "cpu" or "cuda"."""
        return str(self.model.model.device.type)

    @property
    def profile(self) -> ModelProfile:
        """What the probes found; there is one, because the model can be composed."""
        if self.model.profile is None:
            raise AssertionError("subjects are loaded with attention='block'")
        return self.model.profile

    @property
    def layout(self) -> KVLayout:
        """Shapes of the model's KV states."""
        return self.profile.layout

    def cache_bytes(self, num_tokens: int) -> int:
        """Bytes that so many tokens take in a prompt's cache."""
        return self.layout.nbytes(num_tokens, self.model.model.dtype.itemsize)

    def again(self, *, precision: Precision | None = None, keeps: bool = False, pool_bytes: int = 0) -> Subject:
        """The same weights in a `BlockModel` of its own, with empty buffers.

        Args:
            precision: At rest; by default this subject's.
            keeps: Whether finished prompts stay composed for the next one, as they do unless a measurement forbids it.
            pool_bytes: Of hot blocks on the model's device.
        """
        model = BlockModel(
            self.model.model,
            self.model.tokenizer,
            template=self.model.template,
            precision=precision or self.model.precision,
            facts=self.model.facts,
            kept_bytes=None if keeps else 0,
            device_pool=DevicePool(pool_bytes, self.model.model.device) if pool_bytes else None,
        )
        return Subject(model, self.name, self.random_weights)

    def option(self) -> str:
        """How the command line names it."""
        return f"--{'shape' if self.random_weights else 'model'} {self.name}"

    def describe(self) -> dict[str, Any]:
        """What a result says about its model."""
        config = self.model.model.config.get_text_config(decoder=True)
        return {
            "name": self.name,
            "weights": "random" if self.random_weights else "checkpoint",
            "parameters": sum(parameter.numel() for parameter in self.model.model.parameters()),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "attention_heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "compute_dtype": str(self.model.model.dtype).removeprefix("torch."),
            "precision_at_rest": self.model.precision,
            "kv_bytes_per_token_in_cache": self.cache_bytes(1),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectSpec:
    """What to measure, before it is loaded: plain values that another process can be told.

    Args:
        shape: A name from `SHAPES`; ignored where a model is given.
        model: A checkpoint, as `BlockModel.from_pretrained` takes it.
        device: As `BlockModel.from_pretrained` takes it.
        dtype: What to compute in; "auto" is float32 on a CPU, and on a GPU the checkpoint's own or bfloat16.
        precision: At rest; see `BlockModel`.
        seed: Of a shape's weights.
    """

    shape: str = "tiny-15m"
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    precision: Precision | None = None
    seed: int = 0

    def load(self) -> Subject:
        """The model, loaded or built and probed.

        Raises:
            InputError: There is no such shape, model, device, dtype or precision.
            UnsupportedModelError: The model cannot be composed.
        """
        return self._built() if self.model is None else self._loaded(self.model)

    def _built(self) -> Subject:
        """A shape with random weights and a byte-level tokenizer without merges."""
        if self.shape not in SHAPES:
            raise InputError(f"there is no shape {self.shape!r}; use one of {', '.join(SHAPES)}, or a model's path")
        placed = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, placed)
        torch.manual_seed(self.seed)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
        try:
            # Built where it is used: eight billion parameters would take minutes to draw on a CPU.
            with placed:
                model = SHAPES[self.shape]()
        finally:
            torch.set_default_dtype(previous)
        facts = BlockAttentionFacts(block_fine_tuned=True)
        template = TEMPLATES["plain"]
        tokenizer = _byte_tokenizer()
        built = BlockModel(model, tokenizer, template=template, facts=facts, precision=self.precision, kept_bytes=0)
        return Subject(built, self.shape, random_weights=True)

    def _loaded(self, model: str) -> Subject:
        """A checkpoint; it counts as fine-tuned for block attention, because its answers are not looked at."""
        loaded = BlockModel.from_pretrained(
            model,
            device=self.device,
            dtype=self.dtype,
            precision=self.precision,
            block_fine_tuned=True,
            kept_bytes=0,
        )
        # The bundled checkpoint lies in a directory of another name, which `--model` does not know.
        name = model if model == "demo" else loaded.name
        return Subject(loaded, name, random_weights=False)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Only there because a model has one: the blocks are random tokens, and unknown ids decode to nothing."""
    pieces = [*_CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
