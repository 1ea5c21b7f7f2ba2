"""Passages that stay composed for the next prompt that opens with them: only the time it takes gives it away."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_exactness import LENGTHS, QUERY, oracle_greedy, prompt_of
from test_rag import PASSAGES
from tiny_models import CASES, LONGROPE, WINDOW, ModelCase
from tiny_tokenizers import plain_tokenizer

from blockrag.encoders.lexical import LexicalEncoder
from blockrag.errors import InputError, PromptTooLongError
from blockrag.index import PassageIndex
from blockrag.model.block_model import BlockModel
from blockrag.model.cache import PromptCache
from blockrag.model.sampling import GenerationOptions
from blockrag.model.usage import Usage
from blockrag.prompt import Block, SegmentedPrompt
from blockrag.rag import BlockRAG
from blockrag.stores import MemoryStore

Make = Callable[..., BlockModel]
PROMPT = prompt_of(LENGTHS, QUERY)
OTHER = prompt_of((20, 6), QUERY, seed=8)
# The same passages, another question of the same length.
AGAIN = SegmentedPrompt((*PROMPT.local_blocks, OTHER.blocks[-1]), stop=())
TOKENS = sum(LENGTHS)
KEPT = 1 << 30


def options(**values: Any) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": 8, "ignore_eos": True, **values})


def logits_of(model: BlockModel, prompt: SegmentedPrompt, count: int = 6, **arguments: Any) -> tuple[Usage, Any]:
    """What a prompt cost, and the logits (count + 1, vocabulary) of its greedy answer."""
    running = model.start(**arguments)
    try:
        running.extend(prompt.blocks, room=count)
        logits = [running.logits]
        for _ in running.answer(options(max_new_tokens=count), prompt.stop):
            logits.append(running.logits)
        return running.usage, torch.stack(logits)  # type: ignore[arg-type]
    finally:
        running.close()


def kept_tokens(model: BlockModel, prompt: SegmentedPrompt, **arguments: Any) -> int:
    return logits_of(model, prompt, **arguments)[0].tokens_kept


def turn(*ids: int) -> Block:
    return Block(token_ids=ids, text="", local=False, kind="turn")


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def family(request: pytest.FixtureRequest, make_model: Make) -> BlockModel:
    return make_model(request.param.id, kept_bytes=KEPT)


def test_the_same_passages_again_are_neither_read_nor_composed(family: BlockModel) -> None:
    first, expected = logits_of(family, PROMPT)
    assert (first.blocks_kept, first.tokens_kept) == (0, 0)
    read = family.store.stats()
    usage, logits = logits_of(family, PROMPT)
    assert (usage.blocks_kept, usage.blocks_reused) == (len(LENGTHS), len(LENGTHS))
    assert (usage.tokens_kept, usage.tokens_reused, usage.tokens_computed) == (TOKENS, TOKENS, QUERY)
    assert usage.prompt_tokens == PROMPT.num_tokens
    after = family.store.stats()
    assert (after.hits, after.misses) == (read.hits, read.misses)
    assert torch.equal(logits, expected)


def test_nothing_of_a_prompt_reaches_the_next(family: BlockModel, make_model: Make) -> None:
    """A, B, A, B, ..., and other questions about the same passages: each as on a model that never answered anything."""
    expected = {
        prompt: logits_of(BlockModel(family.model, family.tokenizer, facts=family.facts, precision="float32"), prompt)[
            1
        ]
        for prompt in (PROMPT, OTHER, AGAIN)
    }
    kept = []
    for prompt in (PROMPT, OTHER, PROMPT, AGAIN, OTHER, PROMPT, AGAIN):
        usage, logits = logits_of(family, prompt)
        kept.append(usage.blocks_kept)
        assert torch.equal(logits, expected[prompt])
    assert kept == [0, 0, 4, 4, 2, 4, 4]


def test_a_conversation_of_several_turns_leaves_only_its_opening(family: BlockModel) -> None:
    """More passages, more questions, an answer cut by a stop string: then the same passages are asked about again."""
    _, expected = logits_of(family, PROMPT)
    running = family.start()
    running.extend(PROMPT.blocks, room=6)
    assert running.usage.tokens_kept == TOKENS
    said = [chunk.token_id for chunk in running.answer(options(max_new_tokens=4), ())]
    running.extend([*OTHER.local_blocks, turn(9, 10, 11)], room=30)
    assert running.usage.tokens_kept == 0, "each turn counts for itself"
    kept = Block(tuple(said), "", local=False, kind="turn")
    oracle = family.reference_logits([*PROMPT.blocks, kept, *OTHER.local_blocks, turn(9, 10, 11)])[-1]
    assert running.logits is not None
    assert (running.logits - oracle).abs().max() <= 1e-5
    running.close()
    usage, logits = logits_of(family, PROMPT)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert usage.tokens_kept in (0, TOKENS), "the conversation may have outgrown its buffer"


def test_a_conversation_within_its_room_is_kept(make_model: Make) -> None:
    model = make_model("gemma3", kept_bytes=KEPT)
    _, expected = logits_of(model, PROMPT)
    running = model.start()
    running.extend(PROMPT.blocks, room=6)
    for _ in range(3):
        list(running.answer(options(max_new_tokens=4), ()))
        running.extend([turn(9, 10, 11)], room=4)
    running.close()
    usage, logits = logits_of(model, PROMPT)
    assert usage.tokens_kept == TOKENS
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
def test_a_stop_string_leaves_no_trace(make_model: Make, case: str) -> None:
    model = make_model(case, kept_bytes=KEPT)
    said = model.generate(PROMPT, options())
    stop = plain_tokenizer().decode(list(said.token_ids[3:5]))
    stopped = [model.generate(PROMPT, options(stop=(stop,))) for _ in range(2)]
    assert stopped[1].usage.tokens_kept == TOKENS
    assert stopped[0].token_ids == stopped[1].token_ids == said.token_ids[: len(stopped[0].token_ids)]
    assert model.generate(PROMPT, options()).token_ids == said.token_ids


def test_batches_before_and_after_change_nothing(make_model: Make) -> None:
    model = make_model("mistral", kept_bytes=KEPT)
    prompts = [PROMPT, OTHER, AGAIN]
    expected = [list(oracle_greedy(model, prompt, 8)) for prompt in prompts]
    for _ in range(2):
        assert [list(g.token_ids) for g in model.generate(prompts, options())] == expected
        assert [list(model.generate(prompt, options()).token_ids) for prompt in prompts] == expected
    assert model.generate(PROMPT, options()).usage.tokens_kept == TOKENS


# -- When it is not the same -----------------------------------------------------------------------------------------


def test_only_the_same_passages_in_the_same_order_count(make_model: Make) -> None:
    model = make_model(kept_bytes=KEPT)
    a, b, c, d, query = PROMPT.blocks
    kept_tokens(model, PROMPT)
    for blocks in ((b, a, c, d), (a, b, c), (a, b, c, d, d), (a, turn(7), b, c, d)):
        prompt = SegmentedPrompt((*blocks, query), stop=())
        usage, logits = logits_of(model, prompt)
        assert usage.blocks_kept == 0
        assert (logits[0] - model.reference_logits(prompt.blocks)[-1]).abs().max() <= 1e-5
    assert kept_tokens(model, PROMPT) == TOKENS


def test_what_is_behind_the_opening_is_composed_each_time(make_model: Make) -> None:
    model = make_model("mistral", kept_bytes=KEPT)
    prompt = SegmentedPrompt((*PROMPT.local_blocks, turn(7, 8), *OTHER.blocks), stop=())
    for _ in range(2):
        usage, logits = logits_of(model, prompt)
        assert (logits[0] - model.reference_logits(prompt.blocks)[-1]).abs().max() <= 1e-5
    assert (usage.blocks_kept, usage.blocks_reused) == (4, 6)
    assert usage.prompt_tokens == prompt.num_tokens


def test_each_regime_has_its_own(make_model: Make) -> None:
    """The same passages before a short and before a long question are not the same KV states."""
    model = make_model(ModelCase("phi3-longrope", "phi3", LONGROPE), kept_bytes=KEPT)
    local = prompt_of((20, 20), 6).local_blocks
    short = SegmentedPrompt((*local, turn(*range(3, 9))), stop=())
    long = SegmentedPrompt((*local, turn(*range(3, 33))), stop=())
    for number in range(2):
        for prompt in (short, long):
            usage, logits = logits_of(model, prompt)
            assert usage.blocks_kept == 2 * number
            assert (logits[0] - model.reference_logits(prompt.blocks)[-1]).abs().max() <= 1e-5


def test_another_store_and_another_namespace_compose_their_own(make_model: Make) -> None:
    """Who names a store expects the blocks to be looked for, and stored, there."""
    model = make_model(kept_bytes=KEPT)
    kept_tokens(model, PROMPT)
    other = MemoryStore()
    assert kept_tokens(model, PROMPT, store=other) == 0
    assert other.stats().blocks == len(LENGTHS)
    assert kept_tokens(model, PROMPT, store=other) == TOKENS
    assert kept_tokens(model, PROMPT) == TOKENS
    model.namespace = "other"
    del model.__dict__["_source"]
    assert kept_tokens(model, PROMPT) == 0


def test_full_attention_has_nothing_to_keep(make_model: Make) -> None:
    model = make_model(kept_bytes=KEPT)
    for _ in range(2):
        assert model.generate(PROMPT, options(), attention="full").usage.tokens_kept == 0
    assert model.prompt_memory().kept_prompts == 0
    assert model.prompt_memory().spare_bytes > 0


def test_a_store_that_lost_the_blocks_does_not_matter(make_model: Make) -> None:
    """What is kept was verified when it was composed, and is found by the tokens it is of."""
    model = make_model(kept_bytes=KEPT)
    _, expected = logits_of(model, PROMPT)
    assert model.store.delete_many(list(model.store.keys())) == len(LENGTHS)
    usage, logits = logits_of(model, PROMPT)
    assert usage.tokens_kept == TOKENS
    assert torch.equal(logits, expected)


# -- Room ------------------------------------------------------------------------------------------------------------


def test_a_longer_answer_composes_its_own_and_takes_the_place(make_model: Make) -> None:
    model = make_model("gemma3", kept_bytes=KEPT)
    kept_tokens(model, PROMPT)
    usage, _ = logits_of(model, PROMPT, count=90)
    assert usage.tokens_kept == 0, "no room for 90 tokens"
    assert model.prompt_memory().kept_prompts == 1
    assert logits_of(model, PROMPT, count=90)[0].tokens_kept == TOKENS
    assert kept_tokens(model, PROMPT) == TOKENS


def test_a_question_a_little_longer_fits(make_model: Make) -> None:
    model = make_model("mistral", kept_bytes=KEPT)
    for extra in (0, 1, 17, 40):
        prompt = SegmentedPrompt((*PROMPT.local_blocks, prompt_of((), QUERY + extra).blocks[0]), stop=())
        assert kept_tokens(model, prompt) == (TOKENS if extra else 0)


@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_a_cache_that_outgrew_its_buffer_is_not_kept(make_model: Make, case: str) -> None:
    """A full layer moved to memory of its own, a windowed one dropped what its window would reach again."""
    model = make_model(case, kept_bytes=KEPT)
    _, expected = logits_of(model, PROMPT)
    running = model.start()
    running.extend(PROMPT.blocks, room=2)
    running.extend([turn(*range(3, 203))], room=4)
    running.close()
    assert model.prompt_memory().kept_prompts == 0
    usage, logits = logits_of(model, PROMPT)
    assert usage.tokens_kept == 0
    assert torch.allclose(logits, expected, atol=1e-6)


def test_a_window_that_moved_on_is_not_kept(make_model: Make) -> None:
    """Token by token, the windowed layers drop the passages' last tokens and stay in the buffer."""
    model = make_model("mistral", kept_bytes=KEPT)
    running = model.start()
    running.extend(PROMPT.blocks, room=2)
    list(running.answer(options(max_new_tokens=80), ()))
    assert isinstance(running.cache, PromptCache)
    assert all(layer.in_place for layer in running.cache.kv_layers)
    running.close()
    assert model.prompt_memory().kept_prompts == 0
    assert kept_tokens(model, PROMPT) == 0


def test_a_cache_that_was_repeated_for_beams_is_not_kept(make_model: Make) -> None:
    model = make_model("gemma3", kept_bytes=KEPT)
    running = model.start()
    running.extend(PROMPT.local_blocks, room=12)
    assert isinstance(running.cache, PromptCache)
    running.cache.batch_repeat_interleave(2)
    running.close()
    assert model.prompt_memory().kept_prompts == 0


def test_a_prompt_of_the_models_whole_length_fits(make_model: Make) -> None:
    """The slack for longer questions reserves nothing that no token could use."""
    model = make_model(ModelCase("short", "llama", {"max_position_embeddings": 60}), kept_bytes=KEPT)
    prompt = prompt_of((20, 20), 10)
    for number in range(2):
        generation = model.generate(prompt, options(max_new_tokens=99))
        assert (len(generation.token_ids), generation.usage.blocks_kept) == (10, 2 * number)
    layout = model.profile.layout  # type: ignore[union-attr]
    assert model._pool.free_bytes <= layout.nbytes(60, 4) + 64 * 8


# -- Requests that end early, or run at the same time ----------------------------------------------------------------


def test_streams_that_are_closed_or_dropped_keep_what_they_composed(make_model: Make) -> None:
    model = make_model(kept_bytes=KEPT)
    stream = model.stream(PROMPT, options())
    next(stream)
    stream.close()
    stream.close()
    assert model.prompt_memory().kept_prompts == 1
    stream = model.stream(PROMPT, options())
    next(stream)
    assert model.prompt_memory().kept_prompts == 0, "one prompt at a time uses it"
    del stream
    gc.collect()
    assert model.prompt_memory().kept_prompts == 1
    assert list(model.generate(PROMPT, options()).token_ids) == oracle_greedy(model, PROMPT, 8)


def test_two_at_once_do_not_share(make_model: Make) -> None:
    model = make_model("mistral", kept_bytes=KEPT)
    expected = {prompt: oracle_greedy(model, prompt, 8) for prompt in (PROMPT, AGAIN)}
    kept_tokens(model, PROMPT)
    streams = [model.stream(prompt, options()) for prompt in (PROMPT, AGAIN, PROMPT)]
    for _ in range(8):
        for stream in streams:
            next(stream)
    ended = [stream.finish() for stream in streams]
    assert [list(generation.token_ids) for generation in ended] == [expected[PROMPT], expected[AGAIN], expected[PROMPT]]
    assert [generation.usage.blocks_kept for generation in ended] == [4, 0, 0]
    stats = model.prompt_memory()
    assert stats.kept_prompts == 1, "the last one to end; the others' buffers are in reserve"
    assert stats.spare_bytes > 1.5 * stats.kept_bytes


def test_threads_get_the_answers_they_get_alone(make_model: Make) -> None:
    model = make_model("gemma3", kept_bytes=KEPT)
    prompts = [PROMPT, OTHER, AGAIN, PROMPT]
    expected = [oracle_greedy(model, prompt, 8) for prompt in prompts]
    wrong: list[int] = []

    def work(number: int) -> None:
        for step in range(6):
            index = (number + step) % len(prompts)
            if list(model.generate(prompts[index], options()).token_ids) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model.prompt_memory().hits > 0


def test_an_error_while_composing_keeps_nothing(make_model: Make) -> None:
    class Failing(MemoryStore):
        def get_many(self, keys: Any) -> Any:
            raise RuntimeError("disk gone")

        def get(self, key: str) -> Any:
            raise RuntimeError("disk gone")

    model = make_model(kept_bytes=KEPT, store=Failing())
    running = model.start()
    with pytest.raises(RuntimeError, match="disk gone"):
        running.extend(PROMPT.blocks, room=4)
    running.close()
    assert model.prompt_memory().kept_prompts == 0


def test_an_error_in_a_layer_leaves_the_passages_as_they_were(make_model: Make) -> None:
    """Some layers hold the question already, others do not: all of them go back to the passages."""
    model = make_model(ModelCase("mistral", "mistral"), kept_bytes=KEPT)
    _, expected = logits_of(model, PROMPT)

    def fail(module: object, inputs: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.model.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(PROMPT, options())
    handle.remove()
    usage, logits = logits_of(model, PROMPT)
    assert usage.tokens_kept == TOKENS
    assert torch.equal(logits, expected)


def test_a_prompt_that_is_refused_takes_nothing(make_model: Make) -> None:
    model = make_model(kept_bytes=KEPT)
    kept_tokens(model, PROMPT)
    with pytest.raises(PromptTooLongError):
        model.generate(SegmentedPrompt((*PROMPT.local_blocks, turn(*[5] * 2100)), stop=()), options())
    assert model.prompt_memory().kept_prompts == 1


# -- Memory ----------------------------------------------------------------------------------------------------------


def bytes_of(model: BlockModel, prompts: Sequence[SegmentedPrompt]) -> int:
    """Bytes of these prompts' buffers, kept."""
    for prompt in prompts:
        kept_tokens(model, prompt)
    return model.prompt_memory().kept_bytes


def test_the_least_recently_used_go_first(make_model: Make) -> None:
    prompts = [prompt_of((30,), 4, seed=seed) for seed in range(4)]
    three = bytes_of(make_model(kept_bytes=KEPT), prompts[:3])
    model = make_model(kept_bytes=three)
    assert bytes_of(model, prompts[:3]) == three
    assert kept_tokens(model, prompts[0]) == 30, "used again: now the newest"
    assert kept_tokens(model, prompts[3]) == 0
    stats = model.prompt_memory()
    assert (stats.kept_prompts, stats.kept_bytes, stats.spare_bytes) == (3, three, 0)
    assert [kept_tokens(model, prompts[n]) for n in (0, 2, 3)] == [30, 30, 30]
    assert kept_tokens(model, prompts[1]) == 0


def test_a_cap_below_one_prompt_keeps_none(make_model: Make) -> None:
    model = make_model(kept_bytes=1000)
    for _ in range(2):
        assert kept_tokens(model, PROMPT) == 0
    assert model.prompt_memory().kept_prompts == 0


def test_keeping_can_be_switched_off(make_model: Make) -> None:
    model = make_model(kept_bytes=0)
    for _ in range(2):
        assert kept_tokens(model, PROMPT) == 0
    stats = model.prompt_memory()
    assert (stats.kept_prompts, stats.kept_bytes, stats.hits, stats.misses) == (0, 0, 0, 0)
    assert stats.spare_bytes > 0
    with pytest.raises(InputError, match="kept_bytes=-1"):
        make_model(kept_bytes=-1)


def test_hits_and_misses_are_counted(make_model: Make) -> None:
    model = make_model(kept_bytes=KEPT)
    for prompt in (PROMPT, OTHER, PROMPT, PROMPT):
        kept_tokens(model, prompt)
    stats = model.prompt_memory()
    assert (stats.hits, stats.misses, stats.kept_prompts) == (2, 2, 2)


def test_forgetting_frees_what_is_kept_and_what_is_in_progress(make_model: Make) -> None:
    model = make_model(kept_bytes=KEPT)
    kept_tokens(model, OTHER)
    stream = model.stream(PROMPT, options())
    next(stream)
    model.forget_kept()
    assert model._pool.free_bytes == 0
    assert list(stream.finish().token_ids) == oracle_greedy(model, PROMPT, 8)
    assert model._pool.free_bytes == 0, "nor does what was in progress come back"
    assert kept_tokens(model, PROMPT) == kept_tokens(model, OTHER) == 0


@pytest.fixture
def rag(make_model: Make) -> BlockRAG:
    built = BlockRAG(make_model("qwen3", kept_bytes=KEPT), PassageIndex(LexicalEncoder()), top_k=3)
    built.ingest(PASSAGES)
    return built


def test_a_question_asked_twice_composes_once(rag: BlockRAG) -> None:
    first, second = (rag.query("What is the capital of Celmar?", options()) for _ in range(2))
    assert second.text == first.text
    assert first.usage.blocks_kept == 0
    assert second.usage.blocks_kept == second.usage.blocks_reused == first.usage.blocks_reused == 4
    with rag.chat() as chat:
        assert chat.query("What is the capital of Celmar?", options()).usage.blocks_kept == 4


def test_deleting_and_ingesting_documents_forgets(rag: BlockRAG) -> None:
    rag.query("What is the capital of Celmar?", options())
    assert rag.model.prompt_memory().kept_prompts == 1
    rag.delete("Celmar")
    assert rag.model._pool.free_bytes == 0
    rag.query("What is the capital of Arlen?", options())
    rag.ingest(PASSAGES[:2], prune=True)
    assert rag.model._pool.free_bytes == 0


def test_windows_are_covered() -> None:
    """The prompts above are longer than the window, and one block is."""
    assert TOKENS > 2 * WINDOW
    assert max(LENGTHS) > WINDOW
