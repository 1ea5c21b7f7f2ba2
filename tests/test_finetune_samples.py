"""Training lines as token ids: the same that inference sends, and errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_finetune_exact import asked_of
from tiny_models import CASES, tiny_model
from tiny_tokenizers import byte_level_tokenizer, chatml_tokenizer, llama3_tokenizer, plain_tokenizer
from tiny_training import PREFIXED, every_kind, rag_line, rag_lines, samples_from, write_data

from blockrag.errors import DataError
from blockrag.finetune.data.lines import BlocksLine, ChatLine, Line
from blockrag.finetune.reading import read_samples
from blockrag.finetune.samples import Branch, Ids, Sample, fitted
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.prompt import TEMPLATES, PromptTemplate, template_for

MAKE = {
    "tulu": plain_tokenizer,
    "tulu-block": lambda: byte_level_tokenizer(("<|end_of_text|>", "<pad>"), eos_token="<|end_of_text|>"),
    "llama3": llama3_tokenizer,
    "chatml": chatml_tokenizer,
    "plain": plain_tokenizer,
    "derived": plain_tokenizer,
}
DERIVED_CHAT = (
    "{% for message in messages %}{{ '[' + message['role'] + ']\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)


def named(name: str) -> tuple[PromptTemplate, object]:
    tokenizer = MAKE[name]()
    if name != "derived":
        return TEMPLATES[name], tokenizer
    tokenizer.chat_template = DERIVED_CHAT
    template = template_for(tokenizer)
    assert template.name not in TEMPLATES, "derived from the chat template"
    return template, tokenizer


@pytest.mark.parametrize("prefix", ["", PREFIXED])
@pytest.mark.parametrize("name", MAKE)
def test_the_tokens_are_those_inference_sends(tmp_path: Path, name: str, prefix: str) -> None:
    """Blocks and query of every sample, in both attentions, and the answer behind them."""
    template, tokenizer = named(name)
    template = replace(template, block_attention_prefix=prefix or template.block_attention_prefix)
    lines = every_kind()
    samples = samples_from(tmp_path, lines, tokenizer, template)
    asked = iter([one for line in lines for one in asked_of(line, template, tokenizer)])
    for sample in samples:
        full = sample.without_marker()
        for number, branch in enumerate(sample.branches):
            prompt, answer = next(asked)
            assert [list(block) for block in (*sample.blocks, branch.query)] == [
                list(block.token_ids) for block in prompt.blocks
            ]
            seen = [token for block in (*full.blocks, full.branches[number].query) for token in block]
            assert tuple(seen) == prompt.as_full().token_ids
            assert tuple(branch.answer) == template.answer_block(tokenizer, answer).token_ids
    assert next(asked, None) is None


@pytest.mark.parametrize("name", MAKE)
def test_inference_stops_at_what_ends_an_answer(name: str) -> None:
    template, tokenizer = named(name)
    model = BlockModel(
        tiny_model(CASES[0]), tokenizer, template=template, facts=BlockAttentionFacts(block_fine_tuned=True)
    )
    *said, end = template.answer_block(tokenizer, "the author").token_ids
    assert end in model.stop_ids
    assert not model.stop_ids.intersection(said)


def test_the_answer_continues_the_markup_as_a_turn_of_a_conversation_does() -> None:
    """Prompt and answer, joined, are the text of a finished turn."""
    for name in ("tulu", "llama3", "chatml", "plain"):
        template, tokenizer = named(name)
        messages = [{"role": "user", "content": "Who?"}]
        said = template.answer_block(tokenizer, "The author.").text
        opened = template.segment_messages(tokenizer, messages).text + said
        later = template.segment_messages(
            tokenizer, [*messages, {"role": "assistant", "content": "The author."}, {"role": "user", "content": "?"}]
        ).text
        end = next((stop for stop in template.stop if stop in tokenizer.get_added_vocab()), tokenizer.eos_token)
        assert later.startswith(opened.removesuffix(end)), name


def test_a_lone_query_keeps_its_marker_under_block_attention_alone(tmp_path: Path) -> None:
    template = replace(TEMPLATES["plain"], block_attention_prefix=PREFIXED)
    tokenizer = plain_tokenizer()
    (sample,) = samples_from(tmp_path, [BlocksLine(("Which sea?\n",), "this one")], tokenizer, template)
    assert tokenizer.decode(list(sample.branches[0].query)) == f"{PREFIXED}Which sea?\n"
    assert tokenizer.decode(list(sample.without_marker().branches[0].query)) == "Which sea?\n"
    (sample,) = samples_from(tmp_path, [BlocksLine(("", "The sea.\n", "Which?\n"), "this one")], tokenizer, template)
    assert [tokenizer.decode(list(block)) for block in sample.blocks] == [PREFIXED, "The sea.\n"]
    assert [tokenizer.decode(list(block)) for block in sample.without_marker().blocks] == ["The sea.\n"]


def test_every_answer_of_a_conversation_is_a_sample(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    conversation = every_kind()[-2]
    first, second = samples_from(tmp_path, [conversation], tokenizer, TEMPLATES["chatml"])
    texts = [[tokenizer.decode(list(block)) for block in sample.blocks] for sample in (first, second)]
    assert texts[0] == ["<|im_start|>system\nYou answer.<|im_end|>\n"]
    assert texts[1] == [
        *texts[0],
        "<|im_start|>user\nWho wrote it?<|im_end|>\n",
        "<|im_start|>assistant\nThe author.<|im_end|>\n",
    ]
    assert tokenizer.decode(list(second.branches[0].answer)) == "In 1843.<|im_end|>"


def _sample(shared: int, *branches: int) -> Sample:
    ids = iter(range(10_000))

    def take(count: int) -> Ids[int]:
        return Ids("i", [next(ids) for _ in range(count)])

    blocks = (take(shared),) if shared else ()
    return Sample(blocks, tuple(Branch(take(one - 1), take(1)) for one in branches), (0, 0), "here, line 7")


@settings(max_examples=80, deadline=None)
@given(
    shared=st.integers(0, 20), branches=st.lists(st.integers(2, 20), min_size=1, max_size=12), room=st.integers(22, 60)
)
def test_questions_are_shared_out_to_samples_that_fit(shared: int, branches: list[int], room: int) -> None:
    limit = max(room, shared + max(branches))
    found = list(fitted([_sample(shared, *branches)], limit))
    assert all(sample.num_tokens <= limit for sample in found)
    assert [len(branch) for sample in found for branch in sample.branches] == branches
    ids = [tuple(branch.answer) for sample in found for branch in sample.branches]
    assert ids == [tuple(branch.answer) for branch in _sample(shared, *branches).branches]
    for one, following in pairwise(found):
        assert one.num_tokens + len(following.branches[0]) > limit, "no earlier than needed"


def test_a_question_that_cannot_fit_is_an_error_with_its_line() -> None:
    assert len(list(fitted([_sample(10, 5, 6)], 16))) == 2
    with pytest.raises(DataError, match=r"here, line 7: 17 tokens with 1 blocks, more than 16.*--skip-too-long"):
        list(fitted([_sample(10, 5, 7, 5)], 16))


def test_what_is_too_long_can_be_left_out(tmp_path: Path) -> None:
    """Question by question: a line keeps those that fit, and one that keeps none is left out."""
    tokenizer, template = plain_tokenizer(), TEMPLATES["plain"]
    path = write_data(
        tmp_path / "lines.jsonl", [rag_line(1, passages=8), rag_line(2, passages=1), rag_line(3, passages=2)]
    )
    whole, _ = read_samples([path], template, tokenizer, 4096, "error")
    tokens = [sample.num_tokens for sample in whole]
    limit = whole[2].shared_tokens + min(map(len, whole[2].branches))
    assert tokens[1] < limit < tokens[2] < tokens[0]
    with pytest.raises(DataError, match=r"lines\.jsonl, line 1: .* more than"):
        read_samples([path], template, tokenizer, limit, "error")
    kept, skipped = read_samples([path], template, tokenizer, limit, "skip")
    assert skipped == 2
    assert [sample.where[-6:] for sample in kept] == ["line 2", "line 3"]
    assert len(kept[1].branches) == 1
    assert read_samples([path], template, tokenizer, limit, "skip", limit=1) == ([], 1)


def _raw(content: object) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        good = '{"blocks": ["a", "b"], "response": "c"}\n'
        path.write_text(good + "\n" + (content if isinstance(content, str) else json.dumps(content)) + "\n")
        return path

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_raw({"text": "?"}), r"line 3: has the fields \['text'\]"),
        (_raw("{"), "line 3: not valid JSON"),
        (_raw({"passages": [], "question": "q", "answers": []}), "line 3: answers must be a list of at least one"),
        (_raw({"blocks": ["a", "b"], "response": " "}), "line 3: response must be a non-empty string"),
        (_raw({"messages": [{"role": "user", "content": "q"}]}), "line 3: ends with a user message"),
        (
            _raw({"messages": [{"role": "assistant", "content": "a"}]}),
            "line 3: message 1 is an answer without a user message",
        ),
        (lambda path: path, "cannot read"),
        (lambda path: path.write_text("\n") and path, "holds no lines"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, write: Callable[[Path], Path], message: str) -> None:
    path = write(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match=message) as caught:
        read_samples([path], TEMPLATES["plain"], plain_tokenizer(), 4096, "error")
    assert str(path) in str(caught.value)


def test_what_a_template_or_tokenizer_cannot_show_is_named(tmp_path: Path) -> None:
    endless = byte_level_tokenizer(("<pad>",), pad_token="<pad>")
    with pytest.raises(DataError, match=r"lines\.jsonl, line 1: nothing ends an answer"):
        samples_from(tmp_path, rag_lines(1), endless, TEMPLATES["plain"])
    late: Line = ChatLine(
        tuple({"role": role, "content": "x"} for role in ("user", "assistant", "system", "user", "assistant"))
    )
    with pytest.raises(DataError, match=r"lines\.jsonl, line 1: template 'plain' cannot show the roles"):
        samples_from(tmp_path, [late], plain_tokenizer(), TEMPLATES["plain"])
