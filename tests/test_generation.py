"""Answers: sampling, stops, text as it arrives, streams that end early, asynchronous use, full attention."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import LENGTHS, QUERY, oracle_greedy, prompt_of
from tiny_models import LONGROPE, REFUSED_CASES, ModelCase, tiny_model
from tiny_tokenizers import chatml_tokenizer, plain_tokenizer
from transformers import PreTrainedTokenizerFast

from blockrag.errors import InputError, PromptTooLongError, UnsupportedModelError
from blockrag.model.answer import Generation
from blockrag.model.block_model import BlockModel
from blockrag.model.cache import PromptCache
from blockrag.model.detokenize import TextStream
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.sampling import GenerationOptions, Sampler
from blockrag.prompt import Block, SegmentedPrompt

Make = Callable[..., BlockModel]
FINE_TUNED = BlockAttentionFacts(block_fine_tuned=True)
PROMPT = prompt_of(LENGTHS, QUERY)


def options(**values: Any) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": 12, "ignore_eos": True, **values})


def tokens(model: BlockModel, **values: Any) -> list[int]:
    return list(model.generate(PROMPT, options(**values)).token_ids)


class ScriptedModel:
    """Makes a tiny model say given tokens: a hook overwrites its logits, everything else stays real."""

    def __init__(self, script: list[int], make: Make, **arguments: Any) -> None:
        self.model = make(ModelCase("llama", "llama"), **arguments)
        self._script = script
        self._step = 0
        # Registered after the probes of loading.
        self.model.model.register_forward_hook(self._speak)

    def _speak(self, module: torch.nn.Module, inputs: object, output: Any) -> None:
        output.logits[:, -1] = -1e4
        output.logits[:, -1, self._script[min(self._step, len(self._script) - 1)]] = 1e4
        self._step += 1

    def say(self, **values: Any) -> tuple[Generation, list[str]]:
        """The generation, and the pieces of text as they came."""
        self._step = 0
        values.setdefault("max_new_tokens", len(self._script))
        stream = self.model.stream(PROMPT.as_full(), GenerationOptions(**values), attention="full")
        pieces = [chunk.text for chunk in stream]
        return stream.result, pieces


def ids_of(text: str) -> list[int]:
    return list(plain_tokenizer()(text, add_special_tokens=False)["input_ids"])


def bytes_of(text: str) -> list[int]:
    """One token per byte, whatever the merges are."""
    tokenizer = plain_tokenizer()
    single = {tokenizer.convert_ids_to_tokens(i): i for i in range(len(tokenizer))}
    alphabet = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [single[character] for word, _ in alphabet for character in word]


# -- Choosing tokens -------------------------------------------------------------------------------------------------


def test_greedy_is_the_default_and_repeatable(make_model: Make) -> None:
    model = make_model()
    assert tokens(model) == oracle_greedy(model, PROMPT, 12) == tokens(model)


def test_sampling_follows_its_seed(make_model: Make) -> None:
    model = make_model()
    drawn = {seed: tokens(model, temperature=1.0, seed=seed) for seed in range(4)}
    assert drawn[1] == tokens(model, temperature=1.0, seed=1)
    assert len({tuple(ids) for ids in drawn.values()}) == 4
    assert tokens(model, temperature=1.0, seed=-5) == tokens(model, temperature=1.0, seed=-5)


def test_sampling_without_a_seed_is_fresh_and_leaves_the_global_one_alone(make_model: Make) -> None:
    model = make_model()
    state = torch.random.get_rng_state()
    drawn = {tuple(tokens(model, temperature=5.0)) for _ in range(3)}
    assert len(drawn) == 3
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("values", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_narrowest_sampling_is_greedy(make_model: Make, values: dict[str, Any]) -> None:
    model = make_model()
    assert tokens(model, **{"temperature": 0.7, "seed": 3, **values}) == tokens(model)


def test_the_repetition_penalty_keeps_tokens_from_coming_again(make_model: Make) -> None:
    model = make_model()
    with_repeats, without = tokens(model, max_new_tokens=24), tokens(model, max_new_tokens=24, repetition_penalty=50.0)
    assert len(set(with_repeats)) < 24
    assert len(set(without)) == 24
    assert not set(without) & set(PROMPT.token_ids), "tokens of the prompt, composed blocks included, count as said"


def test_sampled_frequencies_are_the_distribution() -> None:
    """Temperature, top-k and top-p together, against the probabilities worked out by hand."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    weights = [math.exp(value / 2) for value in (2.0, 1.0, 0.0)]
    expected = [weight / sum(weights) for weight in weights]
    sampler = Sampler(GenerationOptions(temperature=2.0, top_k=3, seed=0), torch.device("cpu"))
    drawn = torch.tensor([sampler.choose(logits, [0]) for _ in range(4000)]).bincount(minlength=5) / 4000
    torch.testing.assert_close(drawn, torch.tensor([*expected, 0.0, 0.0]), atol=0.03, rtol=0)
    # The two most likely have 0.81 together at temperature 2 and k 3: p 0.8 keeps them, and no third one.
    sampler = Sampler(GenerationOptions(temperature=2.0, top_k=3, top_p=0.8, seed=0), torch.device("cpu"))
    assert {sampler.choose(logits, [0]) for _ in range(500)} == {0, 1}


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen = GenerationOptions(temperature=1.0, seed=1)
    one, other = (Sampler(chosen, torch.device("cpu")) for _ in range(2))
    assert [one.choose(logits, [0]) for _ in range(20)] == [other.choose(logits.float(), [0]) for _ in range(20)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("seed", 1 << 64),
        ("seed", -(1 << 63) - 1),
        ("stop", ("",)),
        ("stop", ("x", 3)),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}=.*out of range"):
        GenerationOptions(**{name: value})


@pytest.mark.parametrize("seed", [(1 << 64) - 1, -(1 << 63), 0])
def test_the_whole_range_of_seeds_works(seed: int) -> None:
    sampler = Sampler(GenerationOptions(temperature=1.0, seed=seed), torch.device("cpu"))
    assert 0 <= sampler.choose(torch.zeros(5), [0]) < 5


def test_a_single_string_is_no_list_of_stops() -> None:
    with pytest.raises(InputError, match=r'pass \("end",\)'):
        GenerationOptions(stop="end")  # type: ignore[arg-type]
    assert GenerationOptions(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_an_unknown_attention_is_refused(make_model: Make) -> None:
    with pytest.raises(InputError, match="attention='sparse' is not one of 'block', 'full'"):
        make_model(attention="sparse")
    with pytest.raises(InputError, match="attention='sparse' is not one of 'block', 'full'"):
        make_model().generate(PROMPT, attention="sparse")  # type: ignore[call-overload]


# -- Where an answer ends --------------------------------------------------------------------------------------------


def test_length(make_model: Make) -> None:
    generation = make_model().generate(PROMPT, options(max_new_tokens=1))
    assert (len(generation.token_ids), generation.finish_reason, generation.usage.new_tokens) == (1, "length", 1)


def test_end_of_sequence_stops_and_is_not_text(make_model: Make) -> None:
    scripted = ScriptedModel([*ids_of("the river"), 2, *ids_of(" runs")], make_model)
    generation, pieces = scripted.say()
    assert generation.text == "".join(pieces) == "the river"
    assert generation.finish_reason == "stop"
    assert generation.token_ids == (*ids_of("the river"), 2)
    ignored, _ = scripted.say(ignore_eos=True)
    assert ignored.text == "the river runs"
    assert ignored.finish_reason == "length"


def test_an_answer_may_be_empty(make_model: Make) -> None:
    generation, pieces = ScriptedModel([2], make_model).say()
    assert (generation.text, generation.token_ids, pieces) == ("", (2,), [])
    assert generation.finish_reason == "stop"


def test_every_end_of_sequence_token_of_a_list_stops(make_model: Make) -> None:
    scripted = ScriptedModel([*ids_of("lake"), 77, 78], make_model)
    scripted.model.model.generation_config.eos_token_id = [77, 9]
    assert scripted.model.stop_ids == {77, 9, 2}, "the model's, and the tokenizer's own"
    assert scripted.say()[0].token_ids[-1] == 77


def test_no_end_of_sequence_token_at_all(make_model: Make) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.eos_token = None
    model = BlockModel(tiny_model(ModelCase("llama", "llama")), tokenizer, facts=FINE_TUNED)
    model.model.generation_config.eos_token_id = None
    assert model.stop_ids == frozenset()
    assert len(model.generate(PROMPT, GenerationOptions(max_new_tokens=5)).token_ids) == 5


def test_a_template_stop_that_is_one_token_needs_no_text() -> None:
    tokenizer = chatml_tokenizer(vocab_size=500)
    model = BlockModel(tiny_model(ModelCase("llama", "llama")), tokenizer, facts=FINE_TUNED)
    (end,) = tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    assert "<|im_end|>" in model.template.stop
    assert end in model.stop_ids


@pytest.mark.parametrize("stop", ["sea", " to the sea", "e lake to", "s from the lake", "T", "."])
@pytest.mark.parametrize("spell", [ids_of, bytes_of], ids=["merged", "bytes"])
def test_stop_strings_end_the_text_and_never_show(
    make_model: Make, stop: str, spell: Callable[[str], list[int]]
) -> None:
    text = "The river runs from the lake to the sea."
    scripted = ScriptedModel(spell(text), make_model)
    generation, pieces = scripted.say(stop=(stop, "never said"), ignore_eos=True)
    assert generation.text == "".join(pieces) == text[: text.index(stop)]
    assert generation.finish_reason == "stop"
    assert scripted._step == len(generation.token_ids), "nothing runs after the stop"


def test_the_earliest_of_several_stops_counts(make_model: Make) -> None:
    scripted = ScriptedModel(ids_of("The river runs from the lake"), make_model)
    assert scripted.say(stop=("lake", "runs", "from"))[0].text == "The river "


def test_what_only_looked_like_a_stop_is_given_out(make_model: Make) -> None:
    """Held back while it may become a stop string, then released, at the latest at the end."""
    scripted = ScriptedModel(bytes_of("a lak of lak"), make_model)
    generation, pieces = scripted.say(stop=("lake",))
    assert generation.text == "".join(pieces) == "a lak of lak"
    assert generation.finish_reason == "length"
    assert pieces[:5] == ["a", " ", "", "", ""]
    assert pieces[5] == "lak "


def test_the_prompts_stops_count_as_well(make_model: Make) -> None:
    scripted = ScriptedModel(ids_of("The river runs"), make_model)
    prompt = SegmentedPrompt(PROMPT.as_full().blocks, stop=(" runs",))
    assert scripted.model.generate(prompt, options(max_new_tokens=9), attention="full").text == "The river"


def test_a_stop_completed_by_the_very_last_token(make_model: Make) -> None:
    scripted = ScriptedModel(bytes_of("ab\n"), make_model)
    generation, _ = scripted.say(stop=("\n",))
    assert (generation.text, generation.finish_reason) == ("ab", "stop")


def test_a_stop_before_a_character_that_never_came() -> None:
    """One token holds the stop and the first byte of a character; the answer ends with it."""
    stream = TextStream(mixed_tokenizer(), ["!"])
    assert stream.push(0) == "a"
    assert stream.push(1) == "", "the token's text is not certain yet"
    assert stream.finish() == ""
    assert (stream.text, stream.stopped) == ("a", True)


def mixed_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary in which token 1 is "!" and the first byte of a three-byte character."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE(vocab={"a": 0, "!â": 1, "b": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_reason_is_stop_when_the_end_reveals_one(make_model: Make) -> None:
    scripted = ScriptedModel([0, 1], make_model)
    scripted.model.tokenizer = mixed_tokenizer()
    generation, pieces = scripted.say(stop=("!",), max_new_tokens=2)
    assert (generation.text, generation.finish_reason) == ("a", "stop")
    assert "".join(pieces) == "a"


# -- Text as it arrives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["naïve café", "漢字かな", "👩‍👩‍👧 ok 🇫🇷", "\u0301e\ufeff", "a\ufffdb"])
def test_characters_of_several_tokens_come_whole(make_model: Make, text: str) -> None:
    scripted = ScriptedModel(bytes_of(text), make_model)
    generation, pieces = scripted.say(ignore_eos=True)
    assert generation.text == "".join(pieces) == text
    whole = [piece for piece in pieces if piece]
    assert all(piece.encode() for piece in whole)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in whole)
        assert len(whole) == len(text), "each character as soon as its last byte is there"


def test_a_character_cut_by_the_end_shows_as_replaced(make_model: Make) -> None:
    cut = bytes_of("a漢")[:-1]
    generation, pieces = ScriptedModel(cut, make_model).say()
    assert generation.text == "a\ufffd"
    assert pieces == ["a", "", "\ufffd"], "with the last token, not once more"
    ended, pieces = ScriptedModel([*cut, 2], make_model).say()
    assert ended.text == "a\ufffd"
    assert pieces == ["a", "", "", "\ufffd"], "the end-of-sequence token made it certain"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=30))
def test_any_stream_is_the_whole_decode(ids: list[int]) -> None:
    """Whatever the tokens, invalid bytes and special tokens included: the pieces join to the decode of all of them."""
    tokenizer = plain_tokenizer()
    stream = TextStream(tokenizer, ())
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == stream.text == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abé漢 \n", max_size=24),
    stops=st.lists(st.text(alphabet="abé漢 \n", min_size=1, max_size=4), max_size=3),
)
def test_any_stream_with_stops(text: str, stops: list[str]) -> None:
    """One byte per token: the text up to the earliest stop to be complete, and no later piece of it ever leaks."""
    stream = TextStream(plain_tokenizer(), stops)
    shown = ""
    for count, token in enumerate(bytes_of(text), start=1):
        shown += stream.push(token)
        seen = bytes_of_text(text, count)
        if stream.stopped:
            break
        assert not any(stop in seen for stop in stops)
        # What is held back is exactly what a stop may still begin with.
        assert seen.startswith(shown)
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    shown += stream.finish()
    cuts = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if cuts:
        end = text[: min(cuts)]
        expected = end[: min(end.index(stop) for stop in stops if stop in end)]
        assert stream.stopped
    else:
        expected = text
        assert not stream.stopped
    assert shown == stream.text == expected


def bytes_of_text(text: str, count: int) -> str:
    """The whole characters among the first `count` bytes."""
    return text.encode()[:count].decode(errors="ignore")


# -- Streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_and_its_generation_agree(make_model: Make) -> None:
    model = make_model()
    stream = model.stream(PROMPT, options())
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.result.text
    assert tuple(chunk.token_id for chunk in chunks) == stream.result.token_ids, "one chunk per token"
    assert stream.finish() is stream.result, "finishing twice is harmless"
    assert list(stream) == []


def test_the_generation_of_an_unfinished_stream_is_an_error(make_model: Make) -> None:
    stream = make_model().stream(PROMPT, options())
    with pytest.raises(InputError, match="read the stream to its end"):
        _ = stream.result
    next(stream)
    with pytest.raises(InputError, match="read the stream to its end"):
        _ = stream.result
    assert len(stream.finish().token_ids) == 12


def test_a_closed_stream_gives_the_cache_back(make_model: Make) -> None:
    model = make_model()
    stream = model.stream(PROMPT, options())
    next(stream)
    assert model._pool.free_bytes == 0
    stream.close()
    stream.close()
    held = model._pool.free_bytes
    assert held > 0
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(InputError):
        stream.finish()
    assert tokens(model) == oracle_greedy(model, PROMPT, 12)
    assert model._pool.free_bytes == held, "the same buffer was used again"


def test_a_dropped_stream_gives_the_cache_back(make_model: Make) -> None:
    model = make_model()
    stream = model.stream(PROMPT, options())
    next(stream)
    del stream
    gc.collect()
    assert model._pool.free_bytes > 0


def test_a_stream_that_never_started_holds_nothing(make_model: Make) -> None:
    model = make_model()
    model.stream(PROMPT, options()).close()
    assert model._pool.free_bytes == 0
    assert model.store.stats().misses == 0


def test_two_streams_in_turn_do_not_disturb_each_other(make_model: Make) -> None:
    model = make_model("mistral")
    other = prompt_of((3, 20), 2, seed=1)
    expected = [list(model.generate(prompt, options()).token_ids) for prompt in (PROMPT, other)]
    streams = [model.stream(prompt, options()) for prompt in (PROMPT, other)]
    for _ in range(12):
        for stream in streams:
            next(stream)
    assert [list(stream.finish().token_ids) for stream in streams] == expected


def test_an_error_in_the_forward_frees_the_cache(make_model: Make) -> None:
    model = make_model(ModelCase("llama", "llama"))
    model.generate(PROMPT, options())
    held = model._pool.free_bytes
    calls = 0

    def fail(module: object, inputs: object, output: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")

    handle = model.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(PROMPT, options())
    handle.remove()
    assert model._pool.free_bytes == held
    assert tokens(model) == oracle_greedy(model, PROMPT, 12)


def test_room_is_bounded_by_what_the_model_can_place(make_model: Make) -> None:
    """A generous max_new_tokens reserves no memory that no token could use."""
    model = make_model()
    stream = model.stream(PROMPT, GenerationOptions(max_new_tokens=10**12))
    next(stream)
    stream.close()
    layout = model.profile.layout  # type: ignore[union-attr]
    assert model._pool.free_bytes <= layout.nbytes(2048, 4) + 64 * 8


def test_the_pool_does_not_grow_over_many_prompts(make_model: Make) -> None:
    model = make_model()
    sizes = set()
    for seed in range(10):
        model.generate(prompt_of(LENGTHS, QUERY, seed=seed), options())
        sizes.add(model._pool.free_bytes)
    assert len(sizes) == 1


def test_a_prompt_beyond_the_models_positions(make_model: Make) -> None:
    model = make_model(ModelCase("short", "llama", {"max_position_embeddings": 40}))
    generation = model.generate(prompt_of((20,), 10), options(max_new_tokens=99))
    assert (len(generation.token_ids), generation.finish_reason) == (10, "length")
    with pytest.raises(
        PromptTooLongError, match=r"the prompt has 40 tokens and the model can place 40; retrieve fewer"
    ):
        model.generate(prompt_of((30,), 10), options())
    assert model.generate(prompt_of((29,), 10), options()).usage.new_tokens == 1


def test_a_model_that_names_no_limit(make_model: Make) -> None:
    profile = make_model().profile
    assert profile is not None
    assert profile.room_after(2000) == 48
    assert replace(profile, max_tokens=None).room_after(10**9) is None


# -- Conversations ---------------------------------------------------------------------------------------------------


def turn(*ids: int) -> Block:
    return Block(token_ids=ids, text="", local=False, kind="turn")


def test_an_answer_that_ended_itself_is_followed_by_the_next_turn(make_model: Make) -> None:
    """The end-of-sequence token is not kept, an answer cut by its length is: the next turn stands where it says."""
    scripted = ScriptedModel([50, 51, 2], make_model)
    model = scripted.model
    running = model.start()
    running.extend(PROMPT.blocks, room=4)
    first = list(running.answer(GenerationOptions(max_new_tokens=9), ()))
    assert [chunk.token_id for chunk in first][:2] == [50, 51]
    running.extend([turn(7, 8)], room=4)
    assert running.token_ids == [*PROMPT.token_ids, 50, 51, 7, 8]
    assert running.cache is not None
    assert running.cache.get_seq_length() == len(running.token_ids)
    assert running.usage.tokens_computed == 2
    running.close()
    running.close()
    assert running.cache is None


def test_the_cut_answers_last_token_is_placed_before_the_next_turn(make_model: Make) -> None:
    model = make_model()
    running = model.start()
    running.extend(PROMPT.blocks, room=2)
    answer = [chunk.token_id for chunk in running.answer(options(max_new_tokens=3), ())]
    running.extend([turn(7, 8)], room=2)
    expected = model.reference_logits([*PROMPT.blocks, turn(*answer), turn(7, 8)])[-1]
    assert running.logits is not None
    assert (running.logits - expected).abs().max() <= 1e-5
    running.close()


def test_empty_blocks_change_nothing(make_model: Make) -> None:
    model = make_model()
    running = model.start()
    running.extend([*PROMPT.local_blocks, turn()], room=2)
    running.extend([Block(token_ids=(), text="", local=True, kind="passage"), PROMPT.blocks[-1]], room=2)
    expected = model.reference_logits(PROMPT.blocks)[-1]
    assert running.logits is not None
    assert (running.logits - expected).abs().max() <= 1e-5
    running.close()


def test_a_longrope_batch_materializes_each_regime(make_model: Make) -> None:
    model = make_model(ModelCase("phi3-longrope", "phi3", LONGROPE))
    short, long = prompt_of((20,), 6), prompt_of((20, 40), 10)
    for prompt, generation in zip((short, long), model.generate([short, long], options(max_new_tokens=4)), strict=True):
        assert list(generation.token_ids) == oracle_greedy(model, prompt, 4)
        assert generation.usage.blocks_computed == len(prompt.blocks), "the one they share is not the same"


def test_no_prompts_no_answers(make_model: Make) -> None:
    assert make_model().generate([]) == []


# -- Full attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3", "gpt-oss", "deepseek-v3"])
def test_full_attention_is_the_plain_model(make_model: Make, case: str) -> None:
    model = make_model(case)
    ids = torch.tensor([PROMPT.token_ids])
    expected = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None
    )[0, ids.shape[1] :].tolist()
    assert list(model.generate(PROMPT, options(max_new_tokens=10), attention="full").token_ids) == expected
    assert model.store.stats().misses == 0, "no block was looked for"


def test_a_batch_in_full_attention_materializes_nothing(make_model: Make) -> None:
    model = make_model()
    other = prompt_of((3, 20), 2, seed=1)
    together = model.generate([PROMPT, other], options(), attention="full")
    alone = [model.generate(prompt, options(), attention="full") for prompt in (PROMPT, other)]
    assert [generation.token_ids for generation in together] == [generation.token_ids for generation in alone]
    assert model.store.stats().blocks == 0


@pytest.mark.parametrize("case", REFUSED_CASES, ids=lambda case: case.id)
def test_models_that_cannot_be_composed_still_answer_in_full(case: ModelCase) -> None:
    plain = tiny_model(case)
    model = BlockModel(plain, plain_tokenizer(), attention="full")
    generation = model.generate(PROMPT, options(max_new_tokens=10))
    ids = torch.tensor([PROMPT.token_ids])
    expected = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None
    )[0, ids.shape[1] :].tolist()
    assert list(generation.token_ids) == expected
    # Step by step the logits are those of one forward as well: greedy tokens of a tiny model may not vary.
    running = model.start()
    running.extend(PROMPT.as_full().blocks, room=8)
    said = [chunk.token_id for chunk in running.answer(options(max_new_tokens=4), ())]
    running.extend([turn(9, 10)], room=0)
    with torch.no_grad():
        whole = plain(torch.tensor([[*PROMPT.token_ids, *said, 9, 10]]), use_cache=False).logits[0, -1]
    assert running.logits is not None
    assert (running.logits - whole).abs().max() <= 1e-4 * whole.abs().max()
    running.close()
    for refused in (lambda: model.prefill([[1]]), lambda: model.block_key([1]), lambda: model.fingerprint):
        with pytest.raises(UnsupportedModelError, match='attention="block" to see why'):
            refused()


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
def test_the_tokens_of_a_stop_string_do_not_stay_in_the_conversation(make_model: Make, case: str) -> None:
    """The next turn's markup says the stop again; twice would be a prompt nobody trained on."""
    model = make_model(case)
    said = model.generate(PROMPT, options(max_new_tokens=8))
    spell = [plain_tokenizer().decode(list(said.token_ids[:n])) for n in range(9)]
    stop = spell[8][len(spell[3]) :]
    assert stop
    assert stop not in spell[7]
    running = model.start()
    running.extend(PROMPT.blocks, room=20)
    list(running.answer(options(stop=(stop,)), ()))
    assert running.token_ids == [*PROMPT.token_ids, *said.token_ids[:3]]
    running.extend([turn(9, 10)], room=4)
    kept = Block(said.token_ids[:3], "", local=False, kind="turn")
    expected = model.reference_logits([*PROMPT.blocks, kept, turn(9, 10)])[-1]
    assert running.logits is not None
    assert (running.logits - expected).abs().max() <= 1e-5
    running.close()


def test_what_is_not_a_causal_language_model_is_refused() -> None:
    class Foreign(torch.nn.Module):
        dtype = torch.float32

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        BlockModel(Foreign(), plain_tokenizer())  # type: ignore[arg-type]


# -- Asynchronous use ------------------------------------------------------------------------------------------------


def drained(model: BlockModel) -> None:
    """Wait for everything that was given to the worker."""
    model._worker.submit(lambda: None).result()


def test_agenerate_is_generate(make_model: Make) -> None:
    model = make_model()

    async def both() -> list[Generation]:
        return list(await asyncio.gather(model.agenerate(PROMPT, options()), model.agenerate(PROMPT, options())))

    for generation in asyncio.run(both()):
        assert list(generation.token_ids) == tokens(model)


def test_astream_gives_the_chunks_of_stream(make_model: Make) -> None:
    model = make_model()

    async def collect() -> list[Any]:
        return [chunk async for chunk in model.astream(PROMPT, options())]

    assert asyncio.run(collect()) == list(model.stream(PROMPT, options()))


def test_the_event_loop_goes_on_while_the_model_works(make_model: Make) -> None:
    """A forward waits for the event loop: that ends only if the loop runs meanwhile."""
    import threading

    model = make_model(ModelCase("llama", "llama"))
    released = threading.Event()
    entered = threading.Event()

    def wait(module: object, inputs: object, output: object) -> None:
        entered.set()
        assert released.wait(timeout=60), "the event loop was blocked"

    handle = model.model.register_forward_hook(wait)

    async def main() -> Generation:
        task = asyncio.create_task(model.agenerate(PROMPT, options(max_new_tokens=2)))
        while not entered.is_set():
            await asyncio.sleep(0)
        released.set()
        return await task

    assert len(asyncio.run(main()).token_ids) == 2
    handle.remove()


def test_leaving_astream_early_frees_worker_and_cache(make_model: Make) -> None:
    model = make_model()

    async def main() -> None:
        chunks = model.astream(PROMPT, options(max_new_tokens=500))
        async for _ in chunks:
            break
        await chunks.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())
    drained(model)
    assert model._pool.free_bytes > 0
    assert tokens(model) == oracle_greedy(model, PROMPT, 12)


def test_abandoning_astream_without_closing_it(make_model: Make) -> None:
    """Only a break: the event loop closes what was dropped."""
    model = make_model()

    async def main() -> None:
        async for _ in model.astream(PROMPT, options(max_new_tokens=500)):
            break

    asyncio.run(main())
    drained(model)
    assert model._pool.free_bytes > 0


def test_cancelling_agenerate_frees_worker_and_cache(make_model: Make) -> None:
    model = make_model()

    async def main() -> None:
        task = asyncio.create_task(model.agenerate(PROMPT, options(max_new_tokens=1500)))
        for _ in range(50):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The worker is free for the next one.
        assert len((await model.agenerate(PROMPT, options(max_new_tokens=2))).token_ids) == 2

    asyncio.run(main())
    drained(model)
    assert model._pool.free_bytes > 0


def test_errors_reach_the_awaiting_task(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(PromptTooLongError):
        asyncio.run(model.agenerate(prompt_of((2100,), 5), options()))
    drained(model)


# -- The prompt cache as users see it --------------------------------------------------------------------------------


def test_a_running_prompt_shows_its_cache(make_model: Make) -> None:
    model = make_model()
    running = model.start()
    running.extend(PROMPT.local_blocks, room=30)
    assert isinstance(running.cache, PromptCache)
    assert running.cache.num_tokens == sum(LENGTHS)
    assert running.usage.prompt_tokens == sum(LENGTHS)
    running.close()


def test_the_models_name(make_model: Make) -> None:
    model = make_model()
    assert model.name == "LlamaForCausalLM"
    model.model.config._name_or_path = "owner/model"
    try:
        assert model.name == "owner/model"
    finally:
        model.model.config._name_or_path = ""
