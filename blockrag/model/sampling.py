"""Choosing tokens: the options of one generation, and the sampler that follows them.

The arithmetic of temperature, top-k, top-p and the repetition penalty is transformers' own.
Source: https://huggingface.co/docs/transformers/internal/generation_utils
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blockrag.errors import InputError, NotFiniteError

__all__ = ["LEAST_TEMPERATURE", "PENALTIES", "GenerationOptions", "Sampler"]

LEAST_TEMPERATURE = 1e-30
"""Logits divided by less may leave the range of 32-bit numbers; 0 divides nothing."""
PENALTIES = (1e-3, 1e3)
"""Logits scaled by penalties outside these may leave it too."""

# What frameworks and the OpenAI API call these options.
_ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "stop_sequences": "stop",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How an answer is generated.

    Args:
        max_new_tokens: Upper bound on the answer's tokens, at least one.
        temperature: 0 for greedy decoding; otherwise, from 1e-30 on, tokens are sampled.
        top_k: Sample among the k most likely tokens; 0 for all.
        top_p: Sample among the most likely tokens that together have this probability; 1 for all.
        repetition_penalty: Above 1 makes tokens of the prompt and the answer less likely (arXiv 1909.05858); from 0.001
            to 1000.
        seed: Makes sampling repeatable, 64 bits; None draws a fresh seed.
        stop: Strings that end the answer, besides the template's; not part of it.
        ignore_eos: Go on past the model's end-of-sequence tokens (for measurements).

    Raises:
        InputError: A value is outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise InputError(f'stop must be a sequence of strings, got the string {self.stop!r}; pass ("{self.stop}",)')
        object.__setattr__(self, "stop", tuple(self.stop))
        checks = {
            "max_new_tokens": isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1,
            "temperature": self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < float("inf"),
            "top_k": isinstance(self.top_k, int) and self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1],
            "seed": self.seed is None or (isinstance(self.seed, int) and -(1 << 63) <= self.seed < 1 << 64),
            "stop": all(isinstance(s, str) and s for s in self.stop),
        }
        for name, valid in checks.items():
            if not valid:
                raise InputError(f"{name}={getattr(self, name)!r} is out of range; see GenerationOptions")

    def updated(self, changes: Mapping[str, object]) -> GenerationOptions:
        """These options with some of them changed, under the names that frameworks and the OpenAI API use.

        Args:
            changes: Values by name; `max_tokens` and `max_completion_tokens` mean `max_new_tokens`, `stop_sequences`
                means `stop`, and `stop` may be a single string. None leaves an option as it is.

        Raises:
            InputError: A name is unknown, or a value has the wrong type or is out of range.
        """
        known = {field.name for field in fields(self)}
        values: dict[str, object] = {}
        for name, value in changes.items():
            option = _ALIASES.get(name, name)
            if option not in known:
                raise InputError(f"there is no option {name!r}; known are {', '.join(sorted(known | set(_ALIASES)))}")
            if value is not None:
                values[option] = (value,) if option == "stop" and isinstance(value, str) else value
        try:
            return replace(self, **values)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError(f"an option has a value of the wrong type ({error}): {values}") from error


class Sampler:
    """Chooses one token after another as the options say.

    Args:
        options: The options.
        device: Where the logits are.
    """

    def __init__(self, options: GenerationOptions, device: torch.device) -> None:
        self._greedy = options.temperature == 0
        self._generator: torch.Generator | None = None
        processors = LogitsProcessorList()
        if options.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
        if not self._greedy:
            self._generator = torch.Generator(device=device)
            if options.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(options.seed)
            if options.temperature != 1:
                processors.append(TemperatureLogitsWarper(options.temperature))
            if options.top_k:
                processors.append(TopKLogitsWarper(options.top_k))
            if options.top_p < 1:
                processors.append(TopPLogitsWarper(options.top_p))
        self._processors = processors

    def choose(self, logits: torch.Tensor, token_ids: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: Logits of the last position, shape (vocabulary,).
            token_ids: The whole text so far, prompt and answer, for the repetition penalty.

        Returns:
            A token id.

        Raises:
            NotFiniteError: A logit is NaN, or none is finite: no token is likelier than another.
        """
        # The largest of several numbers is NaN if one of them is.
        if not -torch.inf < float(logits.max()) < torch.inf:
            raise NotFiniteError(
                "the model's logits hold NaN or infinity, so that no answer can be chosen; compute in float32 or "
                "bfloat16 and check the weights"
            )
        scores = logits[None]
        if self._processors:
            ids = torch.tensor([list(token_ids)], device=logits.device)
            scores = self._processors(ids, scores.float())
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.float().softmax(-1)[0], 1, generator=self._generator))
