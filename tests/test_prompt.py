"""Prompts to blocks: golden strings, and content that can never act as markup."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level_tokenizer, chatml_tokenizer, llama3_tokenizer, plain_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from blockrag.errors import PromptError
from blockrag.passage import Passage
from blockrag.prompt import (
    TEMPLATES,
    Block,
    PromptTemplate,
    SegmentedPrompt,
    Turn,
    merge_pieces,
    parse_rag_prompt,
    split_bbh_prompt,
    split_by_delimiter,
    split_drop_prompt,
    split_turn_demonstrations,
    template_for,
)
from blockrag.prompt.derive import _derive

ADA = Passage(id="ada", title="Ada Lovelace", text="Ada was an English mathematician.\n")
ENGINE = Passage(id="engine", title="Analytical Engine", text="  A proposed mechanical computer.")
PASSAGES = [ADA, ENGINE]
QUESTION = "who wrote the book?"

LLAMA3_PREFIX = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are an intelligent AI assistant. Please answer "
    "questions based on the user's instructions. Below are some reference documents that may help you in answering the "
    "user's question.\n\n"
)
LLAMA3_QUERY = (
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nPlease write a high-quality answer for the given question "
    "using only the provided search documents (some of which might be irrelevant).\nQuestion: who wrote the book?"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
TULU_PREFIX = (
    "<|user|>\nYou are an intelligent AI assistant. Please answer questions based on the user's instructions. Below "
    "are some reference documents that may help you in answering the user's question.\n\n"
)
TULU_QUERY = (
    "\n\nPlease write a high-quality answer for the given question using only the provided search documents (some of "
    "which might be irrelevant).\nQuestion: who wrote the book?\n<|assistant|>\n"
)
PASSAGE_TEXTS = (
    "- Title: Ada Lovelace\nAda was an English mathematician.\n",
    "- Title: Analytical Engine\nA proposed mechanical computer.\n",
)


@pytest.fixture(params=[llama3_tokenizer, chatml_tokenizer, plain_tokenizer], ids=["llama3", "chatml", "plain"])
def tokenizer(request):
    return request.param()


def control_ids(tokenizer):
    return set(tokenizer.added_tokens_decoder)


def texts(prompt):
    return [block.text for block in prompt.blocks]


# -- Golden prompts ----------------------------------------------------------------------------------------------------


def test_the_tulu_prompt_is_the_published_one():
    prompt = TEMPLATES["tulu"].segment(llama3_tokenizer(), passages=PASSAGES, question=QUESTION)
    assert texts(prompt) == [TULU_PREFIX, *PASSAGE_TEXTS, TULU_QUERY]
    assert prompt.stop == ("<|end_of_text|>",)
    assert [block.local for block in prompt.blocks] == [True, True, True, False]
    assert [block.kind for block in prompt.blocks] == ["prefix", "passage", "passage", "query"]
    assert [block.source for block in prompt.blocks] == ["", "ada", "engine", ""]


def test_the_llama3_prompt_is_the_published_one():
    tokenizer = llama3_tokenizer()
    prompt = TEMPLATES["llama3"].segment(tokenizer, passages=PASSAGES, question=QUESTION)
    assert texts(prompt) == [LLAMA3_PREFIX, *PASSAGE_TEXTS, LLAMA3_QUERY]
    assert prompt.blocks[0].token_ids[0] == tokenizer.bos_token_id
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.token_ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2


def test_the_chatml_and_plain_prompts():
    prompt = TEMPLATES["chatml"].segment(chatml_tokenizer(), passages=[ADA], question=QUESTION)
    system = LLAMA3_PREFIX.partition("<|end_header_id|>\n\n")[2]
    instruction = TULU_QUERY.strip("\n").removesuffix("\n<|assistant|>")
    assert texts(prompt) == [
        f"<|im_start|>system\n{system}",
        PASSAGE_TEXTS[0],
        f"<|im_end|>\n<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ]
    prompt = TEMPLATES["plain"].segment(plain_tokenizer(), passages=[ADA], question=QUESTION)
    assert prompt.text == (
        "<bos>Answer the question using the documents.\nTitle: Ada Lovelace\nAda was an English mathematician.\n"
        "Question: who wrote the book?\nAnswer:"
    )
    assert chatml_tokenizer().bos_token is None
    without_bos = TEMPLATES["plain"].segment(chatml_tokenizer(), passages=[], question=QUESTION)
    assert without_bos.text.startswith("Answer the question")


@pytest.mark.parametrize("name", TEMPLATES)
def test_blocks_have_the_ids_of_their_own_text(name, tokenizer):
    template = TEMPLATES[name]
    prompt = template.segment(tokenizer, passages=[*PASSAGES, ADA], question=QUESTION)
    for block in prompt.blocks:
        mark = template.block_attention_prefix if block.kind == "prefix" else ""
        groups = [mark, block.text.removeprefix(mark)]
        assert list(block.token_ids) == [t for g in groups for t in tokenizer(g, add_special_tokens=False).input_ids]
        assert tokenizer.decode(block.token_ids) == block.text
    assert prompt.blocks[1].token_ids == prompt.blocks[3].token_ids == template.passage_block(tokenizer, ADA).token_ids
    assert prompt.blocks[0] == template.prefix_block(tokenizer)
    assert template.passage_blocks(tokenizer, PASSAGES) == list(prompt.blocks[1:3])
    assert template.passage_blocks(tokenizer, []) == []
    assert prompt.lengths == tuple(map(len, prompt.blocks))
    assert sum(prompt.lengths) == prompt.num_tokens == len(prompt.token_ids)
    assert prompt.local_blocks == prompt.blocks[:-1]


def test_the_block_attention_prefix_opens_block_0_and_nothing_else():
    tokenizer = llama3_tokenizer()
    mark = tokenizer("[Block-Attention]", add_special_tokens=False).input_ids
    plain = TEMPLATES["tulu"].segment(tokenizer, passages=PASSAGES, question=QUESTION)
    marked = TEMPLATES["tulu-block"].segment(tokenizer, passages=PASSAGES, question=QUESTION)
    assert list(marked.blocks[0].token_ids) == mark + list(plain.blocks[0].token_ids)
    assert marked.blocks[1:] == plain.blocks[1:]
    llama3 = replace(TEMPLATES["llama3"], block_attention_prefix="[Block-Attention]")
    block = llama3.prefix_block(tokenizer)
    assert block.text.startswith("<|begin_of_text|>[Block-Attention]<|start_header_id|>system")
    assert list(block.token_ids[: len(mark) + 1]) == [tokenizer.bos_token_id, *mark]
    for prompt in (
        llama3.segment_messages(tokenizer, [{"role": "user", "content": "hi"}]),
        llama3.segment_demonstrations(tokenizer, ["one"], question="two"),
    ):
        assert prompt.text.startswith("<|begin_of_text|>[Block-Attention]<|start_header_id|>user")
        assert prompt.text.count("[Block-Attention]") == 1
    given = llama3.segment_blocks(tokenizer, ["[Block-Attention]one", "two"])
    assert texts(given) == ["[Block-Attention]one", "two"]
    assert given == llama3.segment_blocks(tokenizer, ["one", "two"])


def test_no_passages_give_prefix_and_query():
    prompt = TEMPLATES["llama3"].segment(llama3_tokenizer(), passages=[], question=QUESTION)
    assert texts(prompt) == [LLAMA3_PREFIX, LLAMA3_QUERY]
    bare = replace(TEMPLATES["plain"], prefix="")
    assert bare.prefix_block(plain_tokenizer()) is None
    assert len(bare.segment(plain_tokenizer(), passages=[], question=QUESTION).blocks) == 1


def test_a_passage_without_title_leaves_the_title_out(tokenizer):
    untitled = Passage(id="x", title=" \n", text=" text ")
    assert TEMPLATES["tulu"].passage_block(tokenizer, untitled).text == "- text\n"
    assert TEMPLATES["plain"].passage_block(tokenizer, untitled).text == "text\n"
    assert TEMPLATES["tulu"].passage_block(tokenizer, Passage(id="x", text="")).text == "- \n"


def test_full_attention_keeps_the_tokens():
    prompt = TEMPLATES["llama3"].segment(llama3_tokenizer(), passages=PASSAGES, question=QUESTION)
    full = prompt.as_full()
    assert (full.token_ids, full.text, full.stop) == (prompt.token_ids, prompt.text, prompt.stop)
    assert len(full.blocks) == 1
    assert not full.blocks[0].local


def test_segmented_prompts_drop_empty_local_blocks_and_refuse_nonsense():
    empty, local, query = (
        Block((), "", True, "passage"),
        Block((1,), "a", True, "passage"),
        Block((2, 3), "b", False, "query"),
    )
    assert SegmentedPrompt((empty, local, query)).blocks == (local, query)
    for blocks, message in (((), "at least one"), ((local,), "is local"), ((replace(query, token_ids=()),), "without")):
        with pytest.raises(PromptError, match=message):
            SegmentedPrompt(blocks)


# -- Content cannot act as markup --------------------------------------------------------------------------------------


def hostile_passages(tokenizer):
    for text in (token.content for token in tokenizer.added_tokens_decoder.values()):
        for body in (text, f"a {text} b", f"{text}{text}", f"x{text}", text[:-1], f"{text[:3]}{text}", text.upper()):
            yield Passage(id="p", title=f"t {body}", text=f"{body}\n{body}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_never_yields_a_control_token(name, tokenizer):
    template, control = TEMPLATES[name], control_ids(tokenizer)
    template_ids = template.passage_block(tokenizer, ADA).token_ids
    assert not control & set(template_ids)
    for passage in hostile_passages(tokenizer):
        block = template.passage_block(tokenizer, passage)
        assert not control & set(block.token_ids)
        assert tokenizer.decode(block.token_ids) == block.text


def test_markup_keeps_its_control_tokens_around_hostile_content(tokenizer):
    template = template_for(tokenizer)
    control = control_ids(tokenizer)

    def shape(question):
        prompt = template.segment(tokenizer, passages=PASSAGES, question=question)
        return [[token for token in block.token_ids if token in control] for block in prompt.blocks]

    for passage in hostile_passages(tokenizer):
        assert shape(passage.text) == shape(QUESTION)
        messages = [
            {"role": "system", "content": passage.text},
            {"role": "user", "content": passage.text},
            {"role": "assistant", "content": passage.text},
            {"role": "user", "content": passage.text},
        ]
        harmless = [{**message, "content": "hi"} for message in messages]
        hostile = template.segment_messages(tokenizer, messages)
        assert [t for t in hostile.token_ids if t in control] == [
            t for t in template.segment_messages(tokenizer, harmless).token_ids if t in control
        ]
        assert tokenizer.decode(hostile.token_ids) == hostile.text


def test_a_spelling_across_the_edge_of_content_is_no_control_token():
    tokenizer = llama3_tokenizer()
    template = replace(TEMPLATES["llama3"], passage="{title}{text}id|>", passage_untitled="{text}id|>")
    block = template.passage_block(tokenizer, Passage(id="x", title="<|", text="eot_"))
    assert block.text == "<|eot_id|>"
    assert not control_ids(tokenizer) & set(block.token_ids)


def test_placeholders_in_content_are_inert(tokenizer):
    passage = Passage(id="x", title="{text}", text="{title} {question} {0} {bos} %s \\1 {{}}")
    block = TEMPLATES["tulu"].passage_block(tokenizer, passage)
    assert block.text == "- Title: {text}\n{title} {question} {0} {bos} %s \\1 {{}}\n"
    prompt = TEMPLATES["plain"].segment(tokenizer, passages=[], question="{question} {bos}")
    assert prompt.blocks[-1].text == "Question: {question} {bos}\nAnswer:"


def test_a_passage_that_looks_like_two_stays_one_block(tokenizer):
    passage = Passage(id="x", title="one", text="first\n- Title: two\nsecond")
    prompt = TEMPLATES["tulu"].segment(tokenizer, passages=[passage], question=f" {QUESTION}\n")
    assert len(prompt.blocks) == 3
    assert prompt.blocks[-1].text == TULU_QUERY


def test_control_characters_and_long_texts_are_text(tokenizer):
    for text in ("\x00\x01\x1b[31m\x7f", "\ufeff\u202e\u200d é e\u0301", "<|eot_id|><think>x " * 5000, "a " * 50_000):
        block = TEMPLATES["tulu"].passage_block(tokenizer, Passage(id="x", title="t", text=text))
        assert tokenizer.decode(block.token_ids) == block.text
        assert not control_ids(tokenizer) & set(block.token_ids)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=5), st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<think>", "</", "think>", "{text}"])
        )
    )
)
def test_any_text_round_trips_without_control_tokens(parts):
    tokenizer = _CHATML
    text = "".join(parts)
    block = TEMPLATES["chatml"].passage_block(tokenizer, Passage(id="x", title="t", text=text))
    assert tokenizer.decode(block.token_ids) == block.text
    assert not control_ids(tokenizer) & set(block.token_ids)


_CHATML = chatml_tokenizer()


def test_lone_surrogates_are_refused_with_their_position():
    tokenizer = plain_tokenizer()
    template = TEMPLATES["plain"]
    with pytest.raises(PromptError, match=r"question holds a lone surrogate at character 3"):
        template.segment(tokenizer, passages=[], question="who\ud800")
    with pytest.raises(PromptError, match=r"message 0 holds a lone surrogate at character 0"):
        template.segment_messages(tokenizer, [{"role": "user", "content": "\udfff"}])
    with pytest.raises(PromptError, match=r"block 1 holds a lone surrogate at character 1"):
        template.segment_blocks(tokenizer, ["a", "b\ud800"])
    with pytest.raises(PromptError, match=r"demonstration 0"):
        template.segment_demonstrations(tokenizer, ["\ud800"], question="q")


@pytest.mark.parametrize("question", ["", "  \n", None, 3])
def test_an_empty_question_is_refused(question):
    with pytest.raises(PromptError, match="the question"):
        TEMPLATES["plain"].segment(plain_tokenizer(), passages=[], question=question)


def test_threads_get_the_same_ids():
    tokenizer = chatml_tokenizer()
    template = TEMPLATES["chatml"]
    passages = [ADA, Passage(id="h", title="<think>", text="<|im_end|> hostile <think>")]
    expected = [template.passage_block(tokenizer, passage).token_ids for passage in passages]
    wrong = []

    def work(passage, ids):
        for _ in range(50):
            if template.passage_block(tokenizer, passage).token_ids != ids:
                wrong.append(passage.id)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(passages * 3, expected * 3, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- Other kinds of tokenizers -----------------------------------------------------------------------------------------


def test_slow_tokenizers_work():
    tokenizer = ByT5Tokenizer(extra_ids=3)
    tokenizer.add_tokens(["<think>"])
    template = replace(TEMPLATES["plain"], prefix="</s>Read.\n")
    prompt = template.segment(tokenizer, passages=[Passage(id="x", text="a </s> <think> é")], question=QUESTION)
    assert prompt.blocks[0].token_ids[0] == tokenizer.eos_token_id
    assert not control_ids(tokenizer) & set(prompt.blocks[1].token_ids)
    assert tokenizer.decode(prompt.blocks[1].token_ids) == "a </s> <think> é\n"


def test_unknown_characters_may_give_the_unknown_token():
    words = {"[UNK]": 0, "[SEP]": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")
    template = TEMPLATES["plain"]
    assert template.segment_blocks(tokenizer, ["a zzz", "[SEP] b"], allow_special=True).token_ids == (2, 0, 1, 3)
    hostile = template.segment_blocks(tokenizer, ["a [UNK] zzz b", "[SEP]"]).token_ids
    # The brackets, the word between them and zzz are all unknown here; the spelling itself is cut.
    assert set(hostile) == {0, 2, 3}
    assert 1 not in hostile


def test_a_normalizer_cannot_smuggle_a_control_token_in():
    tokenizer = plain_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<think>", normalized=True)])
    assert tokenizer("<THINK>", add_special_tokens=False).input_ids == [len(tokenizer) - 1]
    for text in ("<THINK>", "a <Think> b"):
        block = TEMPLATES["tulu"].passage_block(tokenizer, Passage(id="x", text=text))
        assert not control_ids(tokenizer) & set(block.token_ids)
        assert tokenizer.decode(block.token_ids) == f"- {text.lower()}\n"


def test_a_spelling_only_a_normalizer_reveals_is_cut():
    tokenizer = plain_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ab", "<think>")
    tokenizer.add_tokens([AddedToken("<think>", normalized=True)])
    block = TEMPLATES["tulu"].passage_block(tokenizer, Passage(id="x", text="cabc"))
    assert not control_ids(tokenizer) & set(block.token_ids)


def test_a_character_that_becomes_a_control_token_is_refused():
    tokenizer = plain_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("§", "<think>")
    tokenizer.add_tokens([AddedToken("<think>", normalized=True)])
    with pytest.raises(PromptError, match="'§' becomes a control token"):
        TEMPLATES["plain"].segment_blocks(tokenizer, ["a § a", "a"])


def test_a_vocabulary_that_spells_a_control_token_itself_is_cut():
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -1.0, "a": -2.0, "s": -3.0, "<": -4.0, "/": -4.0, ">": -4.0}
    scores |= dict.fromkeys("unk", -5.0)
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    assert 1 in tokenizer("a </s> a", split_special_tokens=True).input_ids
    for text in ("a </s> a", "a <unk> a"):
        assert not {0, 1, 2} & set(TEMPLATES["plain"].segment_blocks(tokenizer, [text]).token_ids)


def test_an_unknown_token_that_is_also_a_control_token_cannot_be_spelled():
    tokenizer = byte_level_tokenizer(["<eos>"], eos_token="<eos>", unk_token="<eos>")
    template = replace(TEMPLATES["plain"], query="{question}<eos>", follow_up_query="")
    prompt = template.segment(tokenizer, passages=[Passage(id="x", text="a<eos>b")], question="a<eos>b")
    assert prompt.token_ids.count(tokenizer.eos_token_id) == 1
    assert prompt.token_ids[-1] == tokenizer.eos_token_id


def test_the_longest_control_token_of_the_markup_wins():
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens(["<tool", "<tool>"])
    template = replace(TEMPLATES["plain"], query="<tool>{question}", follow_up_query="")
    for question in ("harmless", "<tool> <eos>"):
        ids = template.segment(tokenizer, passages=[], question=question).blocks[-1].token_ids
        assert [t for t in ids if t in control_ids(tokenizer)] == [tokenizer.convert_tokens_to_ids("<tool>")]


def test_the_prefix_does_not_turn_content_into_a_begin_of_sequence_token():
    tokenizer = plain_tokenizer()
    template = replace(TEMPLATES["plain"], block_attention_prefix="[B]")
    prompt = template.segment_blocks(tokenizer, ["<bos>a", "b"])
    assert prompt.text == "[B]<bos>ab"
    assert tokenizer.bos_token_id not in prompt.token_ids


def test_a_special_token_that_is_an_ordinary_character_does_not_forbid_it():
    backend = Tokenizer(models.WordLevel({"!": 0, "a": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!")
    assert TEMPLATES["plain"].segment_blocks(tokenizer, ["a !"]).token_ids == (1, 0)


def test_tokens_added_later_are_control_tokens_too():
    tokenizer, passage = plain_tokenizer(), Passage(id="x", text="<late>")
    before = TEMPLATES["tulu"].passage_block(tokenizer, passage)
    tokenizer.add_tokens(["<late>"])
    after = TEMPLATES["tulu"].passage_block(tokenizer, passage)
    assert tokenizer.decode(after.token_ids) == before.text
    assert not control_ids(tokenizer) & set(after.token_ids)


def test_tokens_that_strip_white_space_do_so_beside_hostile_content_too():
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|l|>", lstrip=True), AddedToken("<|r|>", rstrip=True)]}
    )
    template = replace(TEMPLATES["plain"], query="<|r|> {question} <|l|>", follow_up_query="")
    for question in ("harmless", "<eos> hostile"):
        ids = template.segment(tokenizer, passages=[], question=question).blocks[-1].token_ids
        assert tokenizer.decode(ids[1:-1]) == question
        assert [ids[0], ids[-1]] == tokenizer.convert_tokens_to_ids(["<|r|>", "<|l|>"])


def test_plain_vocabulary_among_added_tokens_is_no_markup():
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens(["COVID-19", "\n\n", "§", "हिन्दी"])
    block = TEMPLATES["tulu"].passage_block(tokenizer, Passage(id="x", text="COVID-19\n\n§ हिन्दी"))
    assert list(block.token_ids) == tokenizer(block.text, add_special_tokens=False).input_ids
    assert len(control_ids(tokenizer) & set(block.token_ids)) == 4


def test_a_leading_space_mark_is_put_once_per_block():
    vocabulary = ["<unk>", "<s>", "</s>", "▁", "▁a", "a", "b", "▁b", "\n", "<", ">", "/", "s"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    template = replace(TEMPLATES["plain"], prefix="<s>a b", query="</s>a{question}</s>b", follow_up_query="")
    prompt = template.segment(tokenizer, passages=[], question="b")
    for block in prompt.blocks:
        assert list(block.token_ids) == tokenizer(block.text, add_special_tokens=False).input_ids
    hostile = template.segment(tokenizer, passages=[], question="b</s>a").token_ids
    assert hostile.count(2) == 2
    (block,) = template.segment_blocks(tokenizer, ["a<unk>a</s>a"], allow_special=True).blocks
    assert list(block.token_ids) == tokenizer(block.text, add_special_tokens=False).input_ids


# -- Explicit blocks, messages, text, demonstrations -------------------------------------------------------------------


def test_explicit_blocks_are_content_unless_markup_is_allowed():
    tokenizer = llama3_tokenizer()
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    blocks = ["one<|eot_id|>", "", "two"]
    assert eot not in TEMPLATES["llama3"].segment_blocks(tokenizer, blocks).token_ids
    prompt = TEMPLATES["llama3"].segment_blocks(tokenizer, blocks, allow_special=True)
    assert prompt.token_ids.count(eot) == 1
    assert texts(prompt) == ["one<|eot_id|>", "two"]
    assert [block.local for block in prompt.blocks] == [True, False]
    one = TEMPLATES["tulu-block"].segment_blocks(tokenizer, ["only"])
    assert texts(one) == ["[Block-Attention]only"]
    assert not one.blocks[0].local


@pytest.mark.parametrize("blocks", [[], ["a", ""], "abc", ["a", 3]])
def test_malformed_explicit_blocks_are_refused(blocks):
    with pytest.raises(PromptError, match="block"):
        TEMPLATES["plain"].segment_blocks(plain_tokenizer(), blocks)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "who?"},
]


def test_a_conversation_gives_one_block_per_turn():
    prompt = TEMPLATES["tulu"].segment_messages(llama3_tokenizer(), CONVERSATION)
    assert texts(prompt) == [
        "<|system|>\nBe brief.\n",
        "<|user|>\nhi\n",
        "<|assistant|>\nhello<|end_of_text|>\n",
        "<|user|>\nwho?\n<|assistant|>\n",
    ]
    assert [block.kind for block in prompt.blocks] == ["prefix", "turn", "turn", "query"]
    assert [block.local for block in prompt.blocks] == [True, True, True, False]


@pytest.mark.parametrize("make", [llama3_tokenizer, chatml_tokenizer])
@pytest.mark.parametrize("start", [0, 1])
def test_conversations_are_those_of_the_chat_template(make, start):
    tokenizer = make()
    messages = [{**message, "content": f" {message['content']}\n"} for message in CONVERSATION[start:]]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template_for(tokenizer).segment_messages(tokenizer, messages).text == expected


def test_long_conversations_are_merged_to_the_limit():
    template, tokenizer = TEMPLATES["tulu"], llama3_tokenizer()
    whole = template.segment_messages(tokenizer, CONVERSATION)
    for limit in range(1, 7):
        prompt = template.segment_messages(tokenizer, CONVERSATION, max_blocks=limit)
        assert len(prompt.blocks) == min(limit, 4)
        assert prompt.text == whole.text
        assert [block.local for block in prompt.blocks] == [True] * (len(prompt.blocks) - 1) + [False]
    merged = template.segment_messages(tokenizer, CONVERSATION, max_blocks=3)
    assert texts(merged)[0] == "<|system|>\nBe brief.\n<|user|>\nhi\n"
    assert list(merged.blocks[0].token_ids) == tokenizer(merged.blocks[0].text, add_special_tokens=False).input_ids
    with pytest.raises(PromptError, match="max_blocks must be at least 1, got 0"):
        template.segment_messages(tokenizer, CONVERSATION, max_blocks=0)


def test_messages_can_be_split_at_delimiters():
    messages = [{"role": "user", "content": "A\n\nB"}, *CONVERSATION[2:3], {"role": "user", "content": "C\n\nD"}]
    prompt = TEMPLATES["tulu"].segment_messages(llama3_tokenizer(), messages, split=True)
    assert texts(prompt) == [
        "<|user|>\nA\n\n",
        "B\n",
        "<|assistant|>\nhello<|end_of_text|>\n",
        "<|user|>\nC\n\n",
        "D\n<|assistant|>\n",
    ]


def test_a_template_without_system_role_opens_the_user_turn_with_the_system_text():
    template = replace(TEMPLATES["tulu"], system=None)
    prompt = template.segment_messages(llama3_tokenizer(), CONVERSATION)
    assert texts(prompt)[:2] == ["<|user|>\nBe brief.\n\n", "hi\n"]
    with pytest.raises(PromptError, match="system"):
        template.segment_messages(llama3_tokenizer(), [CONVERSATION[0], *CONVERSATION[2:]])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "got 0 messages"),
        ([{"role": "user", "content": " "}], "not empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "end with a user message"),
        ([{"role": "tool", "content": "a"}], "roles are system, user, assistant"),
        ([{"role": "user"}], "exactly role and content"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "tool_calls"),
        (["hi"], "str"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be a string, got list"),
        ([CONVERSATION[1], CONVERSATION[0], CONVERSATION[1]], "at most one system message"),
    ],
)
def test_malformed_conversations_are_refused(messages, message):
    with pytest.raises(PromptError, match=message):
        TEMPLATES["tulu"].segment_messages(llama3_tokenizer(), messages)


def test_free_text_is_cut_at_its_delimiters():
    prompt = TEMPLATES["chatml"].segment_text(chatml_tokenizer(), "one\n\ntwo\n\nthree?")
    assert texts(prompt) == ["<|im_start|>user\none\n\n", "two\n\n", "three?<|im_end|>\n<|im_start|>assistant\n"]
    short = TEMPLATES["chatml"].segment_text(chatml_tokenizer(), "one\n\ntwo\n\nthree?", max_blocks=2)
    assert texts(short)[0] == "<|im_start|>user\none\n\ntwo\n\n"
    with pytest.raises(PromptError, match="not empty"):
        TEMPLATES["chatml"].segment_text(chatml_tokenizer(), "")


def test_each_demonstration_is_one_block():
    tokenizer = llama3_tokenizer()
    prompt = TEMPLATES["tulu"].segment_demonstrations(
        tokenizer, ["Q: 1?\nA: 1", "Q: 2?\nA: 2"], question="Q: 3?\nA:", instruction="Solve."
    )
    assert texts(prompt) == [
        "<|user|>\nSolve.\n\n",
        "Q: 1?\nA: 1\n\n",
        "Q: 2?\nA: 2\n\n",
        "Q: 3?\nA:\n<|assistant|>\n",
    ]
    assert [block.kind for block in prompt.blocks] == ["prefix", "passage", "passage", "query"]
    bare = TEMPLATES["plain"].segment_demonstrations(chatml_tokenizer(), [], question="hi")
    assert bare.text == "Question: hi\nAnswer:"
    with pytest.raises(PromptError, match="question is empty"):
        TEMPLATES["plain"].segment_demonstrations(tokenizer, ["a"], question=" ")


def test_a_follow_up_closes_the_answer_and_asks_again():
    tokenizer, template = llama3_tokenizer(), TEMPLATES["llama3"]
    blocks = template.follow_up(tokenizer, passages=PASSAGES, question=QUESTION)
    assert [block.local for block in blocks] == [True, True, True, False]
    assert [block.kind for block in blocks] == ["turn", "passage", "passage", "query"]
    assert blocks[0].text == "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    assert blocks[1] == template.passage_block(tokenizer, ADA)
    assert blocks[-1].text == LLAMA3_QUERY.partition("<|end_header_id|>\n\n")[2]
    (only,) = template.follow_up(tokenizer, passages=[], question=QUESTION)
    assert only.text == LLAMA3_QUERY
    assert not only.local
    for name in TEMPLATES:
        assert "[Block-Attention]" not in TEMPLATES[name].follow_up(tokenizer, passages=[], question="q")[0].text
    unmarked = replace(template, follow_up_open="")
    assert unmarked.follow_up(tokenizer, passages=PASSAGES, question=QUESTION) == blocks[1:]
    with pytest.raises(PromptError, match="cannot continue"):
        replace(template, follow_up_query="").follow_up(tokenizer, passages=[], question="q")
    with pytest.raises(PromptError, match="question is empty"):
        template.follow_up(tokenizer, passages=[], question="")


# -- Templates as data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_survive_json(name):
    template = TEMPLATES[name]
    assert PromptTemplate.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert template.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefx": ""}, "prefx"),
        ({"version": True}, "version"),
        ({"version": 0}, "version from 1"),
        ({"name": ""}, "name"),
        ({"prefix": 3}, "prefix must be a string"),
        ({"prefix": "\ud800"}, "prefix holds a lone surrogate"),
        ({"prefix": "{title}"}, r"prefix must hold at most \{bos\}"),
        ({"passage": "{text}"}, r"passage must hold \{title\}, \{text\}"),
        ({"passage": "{title}{text}{text}"}, "exactly once"),
        ({"passage_untitled": "{title}{text}"}, "passage_untitled"),
        ({"query": "?"}, r"query must hold \{question\}"),
        ({"follow_up_query": "?"}, "follow_up_query"),
        ({"strip_turns": 1}, "strip_turns"),
        ({"stop": "x"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"user": None}, "user"),
        ({"user": {"before": "x"}}, "user must hold the strings before and after"),
        ({"system": {"before": "x", "after": 3}}, "system must hold"),
        ({"system": {"before": "\ud800", "after": ""}}, "system.before"),
    ],
)
def test_malformed_templates_are_refused(change, message):
    with pytest.raises(PromptError, match=message):
        PromptTemplate.from_dict({**TEMPLATES["tulu"].to_dict(), **change})


def test_a_template_without_its_required_keys_is_refused():
    with pytest.raises(PromptError, match=r"lacks \['prefix', 'query', 'version'\]"):
        PromptTemplate.from_dict({"name": "x"})


def test_the_digest_follows_what_shapes_prefix_and_passages():
    template = TEMPLATES["llama3"]
    digest = template.digest()
    assert len(digest) == 64
    assert digest == PromptTemplate.from_dict(template.to_dict()).digest()
    assert replace(template, query="{question}", stop=()).digest() == digest
    changes = ({"passage": "{title}: {text}"}, {"passage_untitled": "{text}"}, {"prefix": ""}, {"version": 2})
    digests = {replace(template, **change).digest() for change in changes}
    assert len(digests | {digest, TEMPLATES["tulu-block"].digest(), TEMPLATES["tulu"].digest()}) == 7


# -- Choosing a template -----------------------------------------------------------------------------------------------


def test_known_markup_gives_the_named_template():
    assert template_for(llama3_tokenizer()) is TEMPLATES["llama3"]
    assert template_for(plain_tokenizer()) is TEMPLATES["plain"]
    chatml = template_for(chatml_tokenizer())
    assert chatml == replace(TEMPLATES["chatml"], default_system="You are a helpful assistant.")
    assert chatml.digest() == TEMPLATES["chatml"].digest()
    tokenizer = llama3_tokenizer()
    assert template_for(tokenizer, name_or_path="someone/Tulu3-RAG") is TEMPLATES["tulu"]
    assert template_for(tokenizer, name_or_path="/models/Tulu3-Block-FT/") is TEMPLATES["tulu-block"]
    assert template_for(tokenizer, name_or_path="/tulu/llama") is TEMPLATES["llama3"]
    no_default = chatml_tokenizer()
    no_default.chat_template = {
        "default": no_default.chat_template.partition("{% endif %}")[2],
        "tool_use": "{{ raise_exception('no') }}",
    }
    assert template_for(no_default) is TEMPLATES["chatml"]


TULU_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role'])"
    " + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.last and messages[0]['role'] == 'system' %}"
    "{{ '[INST] ' + messages[0]['content'] + '\n\n' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
FOLDED_CHAT = (
    "{% set offset = 0 %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ bos_token + '[INST] <<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}"
    "{% if loop.first %}{{ bos_token + '[INST] ' }}{% elif loop.index0 > 1 %}{{ bos_token + '[INST] ' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<<S>>Today is ' + strftime_now('%d %B %Y') + '.<<E>>' }}{% endif %}"
    "{% for m in messages %}{{ {'system': '<<S>>', 'user': '<<U>>', 'assistant': '<<A>>'}[m['role']] }}"
    "{{ m['content'] }}{{ '<<E>>' }}{% endfor %}{% if add_generation_prompt %}{{ '<<A>><think>\n' }}{% endif %}"
)
LEAD_CHAT = (
    "{{ bos_token }}Chat.\n{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def chat_tokenizer(chat_template):
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("chat_template", "has_system", "default_system", "strips"),
    [
        (GEMMA_CHAT, False, "", True),
        (MISTRAL_CHAT, False, "", False),
        (FOLDED_CHAT, False, "", False),
        (THINKING_CHAT, True, "Today is 26 July 2024.", False),
        (LEAD_CHAT, False, "", False),
    ],
    ids=["gemma", "mistral", "folded", "thinking", "lead"],
)
def test_other_chat_templates_are_read_off(chat_template, has_system, default_system, strips):
    tokenizer = chat_tokenizer(chat_template)
    template = template_for(tokenizer)
    assert template.name == "derived"
    assert (template.system is not None) == has_system
    assert (template.default_system, template.strip_turns) == (default_system, strips)
    asked = CONVERSATION[0:] if has_system else CONVERSATION[1:]
    expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert template.segment_messages(tokenizer, asked).text == expected
    prompt = template.segment(tokenizer, passages=PASSAGES, question=QUESTION)
    assert len(prompt.blocks) == 4
    assert prompt.blocks[0].token_ids[0] == tokenizer.bos_token_id
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.text.endswith(template.generation)
    assert "<eos>" in template.stop
    assert PromptTemplate.from_dict(template.to_dict()) == template


def test_the_strings_read_off_a_chat_template():
    template = template_for(chat_tokenizer(GEMMA_CHAT))
    assert template.prefix.startswith("<bos><start_of_turn>user\nYou are an intelligent")
    assert template.query.startswith("\n\nPlease write")
    assert template.query.endswith("{question}<end_of_turn>\n<start_of_turn>model\n")
    assert template.stop == ("<end_of_turn>", "<eos>")
    assert template.follow_up_open == "<end_of_turn>\n<start_of_turn>user\n"
    thinking = template_for(chat_tokenizer(THINKING_CHAT))
    assert thinking.generation == "<<A>><think>\n"
    assert (thinking.system, thinking.user, thinking.assistant) == (
        Turn("<<S>>", "<<E>>"),
        Turn("<<U>>", "<<E>>"),
        Turn("<<A>>", "<<E>>"),
    )
    assert thinking.prefix.startswith("<bos><<S>>You are")
    assert thinking.query.startswith("<<E>><<U>>Please")


def test_a_newline_that_opens_a_turn_is_not_taken_for_the_end_of_the_one_before():
    lines = "{% for m in messages %}{{ '\n' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template = template_for(chat_tokenizer(lines + "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"))
    assert (template.user, template.system) == (Turn("\nuser: ", "\n"), Turn("\nsystem: ", "\n"))
    assert (template.conversation_start, template.generation) == ("", "\nassistant: ")


def test_the_named_templates_are_what_reading_off_gives():
    for tokenizer, name in ((llama3_tokenizer(), "llama3"), (chatml_tokenizer(), "chatml")):
        derived, named = _derive(tokenizer), TEMPLATES[name]
        fields = ("prefix", "query", "conversation_start", "system", "user", "assistant", "generation", "strip_turns")
        fields += ("follow_up_open", "follow_up_query")
        assert [getattr(derived, field) for field in fields] == [getattr(named, field) for field in fields]


def test_the_tulu_chat_template_gives_the_tulu_template():
    tokenizer = byte_level_tokenizer(["<|end_of_text|>"], eos_token="<|end_of_text|>")
    tokenizer.chat_template = TULU_CHAT
    assert template_for(tokenizer) is TEMPLATES["tulu"]


@pytest.mark.parametrize(
    "chat_template",
    [
        "{{ raise_exception('no') }}",
        "{{ undefined.attribute.error }}",
        "no messages",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% if add_generation_prompt %}{{ 'x' }}{% else %}y{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'a' if add_generation_prompt else 'b' }}",
        "{% for m in messages %}{{ m.content }}{{ 'end' if loop.last else loop.index }}{% endfor %}",
    ],
)
def test_a_chat_template_that_cannot_be_read_off_gives_the_plain_template(chat_template):
    assert template_for(chat_tokenizer(chat_template)) is TEMPLATES["plain"]


# -- Splitters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A\n\nB\n\nC", ["A\n\n", "B\n\n", "C"]),
        ("\n\nA\n\nB", ["\n\nA\n\n", "B"]),
        ("A \n\n\t B", ["A \n\n\t ", "B"]),
        ("A\n\nB---C", ["A\n\n", "B---C"]),
        ("x---y", ["x", "---", "y"]),
        ("x ----- y\nz", ["x", " ----- ", "y\nz"]),
        ("---y", ["---", "y"]),
        ("|---|---|", ["|", "---", "|", "---", "|"]),
        ("x===y", ["x", "===", "y"]),
        ("x\n\ty\nz", ["x", "\n\t", "y\nz"]),
        ("x\ny\n z", ["x\n", "y\n ", "z"]),
        ("\nx", ["\nx"]),
        ("\n\n", ["\n\n"]),
        ("whole", ["whole"]),
        ("", [""]),
    ],
)
def test_the_first_kind_of_delimiter_cuts(text, pieces):
    assert split_by_delimiter(text) == pieces


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n\t-=\x0b", max_size=30))
def test_splitting_is_lossless_and_gives_no_empty_piece(text):
    pieces = split_by_delimiter(text)
    assert "".join(pieces) == text
    assert all(pieces) or pieces == [""]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=4), max_size=12), st.integers(1, 6))
def test_merging_is_lossless_and_merges_the_shortest_first(pieces, limit):
    merged = merge_pieces(pieces, limit)
    assert "".join(merged) == "".join(pieces)
    assert len(merged) == min(len(pieces), limit)
    slow = list(pieces)
    while len(slow) > limit:
        shortest = min(range(len(slow)), key=lambda number: len(slow[number]))
        left = max(shortest - 1, 0)
        slow[left : left + 2] = [slow[left] + slow[left + 1]]
    assert merged == slow


def test_merging_updates_lengths():
    assert merge_pieces(["aaaa", "b", "c", "dddd"], 3) == ["aaaab", "c", "dddd"]
    assert merge_pieces(["a", "bb", "ccc"], 2) == ["abb", "ccc"]
    with pytest.raises(PromptError, match="at least 1"):
        merge_pieces(["a"], 0)


def test_splitting_is_linear_in_hostile_text():
    assert len(split_by_delimiter(" " * 200_000 + "x\ny")) == 2
    assert len(split_by_delimiter(" " * 200_000 + "x---y")) == 3
    assert len(merge_pieces(["a\n"] * 50_000, 15)) == 15


def test_demonstration_prompts_are_cut_at_their_demonstrations():
    end = "<|end_of_text|>\n"
    turns = f"<|user|>\n1?\n<|assistant|>\n1{end}<|user|>\n2?\n<|assistant|>\n2{end}<|user|>\n3?\n<|assistant|>\n"
    assert split_turn_demonstrations(turns) == [
        f"<|user|>\n1?\n<|assistant|>\n1{end}",
        f"<|user|>\n2?\n<|assistant|>\n2{end}",
        "<|user|>\n3?\n<|assistant|>\n",
    ]
    assert split_turn_demonstrations("plain") == ["plain"]
    assert split_turn_demonstrations(f"a{end}") == [f"a{end}"]
    assert split_turn_demonstrations("") == [""]
    with pytest.raises(PromptError, match="turn_end"):
        split_turn_demonstrations("x", turn_end="")
    bbh = "Evaluate.\n\nQ: 1?\nA: 1\n\nQ: 2?\nA: 2\n\nQ: 3?\nA:"
    assert split_bbh_prompt(bbh) == ["Evaluate.\n\n", "Q: 1?\nA: 1\n\n", "Q: 2?\nA: 2\n\n", "Q: 3?\nA:"]
    drop = "Read.\n\n# Examples\n---\nPassage 1\nA: 1\n\n---\nPassage 2\nA: 2\n\n# Your Task\n\n---\nPassage 3\nA:"
    pieces = split_drop_prompt(drop)
    assert pieces == [
        "Read.\n\n# Examples\n",
        "---\nPassage 1\nA: 1\n\n",
        "---\nPassage 2\nA: 2\n\n",
        "# Your Task\n\n---\nPassage 3\nA:",
    ]
    assert "".join(pieces) == drop
    assert split_drop_prompt("# Your Task\n\n---\nonly") == ["# Your Task\n\n---\nonly"]
    assert split_drop_prompt("") == [""]


# -- Reading old prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tulu", "tulu-block", "llama3", "chatml"])
def test_a_prompt_string_is_read_back(name):
    tokenizer, template = llama3_tokenizer(), TEMPLATES[name]
    prompt = template.segment(tokenizer, passages=PASSAGES, question=QUESTION)
    passages, question = parse_rag_prompt(prompt.text, template)
    assert [(p.id, p.title, p.text) for p in passages] == [
        ("0", "Ada Lovelace", "Ada was an English mathematician."),
        ("1", "Analytical Engine", "A proposed mechanical computer."),
    ]
    assert question == QUESTION
    again = template.segment(tokenizer, passages=passages, question=question)
    assert again.token_ids == prompt.token_ids
    empty = template.segment(tokenizer, passages=[], question=QUESTION).text
    assert parse_rag_prompt(empty, template) == ((), QUESTION)
    quoting = Passage(id="x", title="t", text=f"a{template.query.partition('{question}')[0]}b")
    again = template.segment(tokenizer, passages=[quoting], question=QUESTION)
    assert parse_rag_prompt(again.text, template) == ((replace(quoting, id="0", document_id="0"),), QUESTION)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("hello", "begins with 'hello'"),
        (LLAMA3_PREFIX + "x", "ends with"),
        (LLAMA3_PREFIX + LLAMA3_QUERY + "answer", "ends with"),
        (LLAMA3_PREFIX + "text" + LLAMA3_QUERY, "passages begin with 'text'"),
        (LLAMA3_PREFIX + "- Title: x" + LLAMA3_QUERY, "no text"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_string_in_another_form_is_refused(prompt, message):
    with pytest.raises(PromptError, match=message):
        parse_rag_prompt(prompt, TEMPLATES["llama3"])


def test_reading_a_string_has_the_documented_hazard():
    passage = Passage(id="x", title="one", text="first\n- Title: two\nsecond")
    text = TEMPLATES["llama3"].segment(llama3_tokenizer(), passages=[passage], question=QUESTION).text
    assert len(parse_rag_prompt(text, TEMPLATES["llama3"])[0]) == 2


def test_prompts_need_no_tokenizer_library_to_import():
    code = "import sys, blockrag.prompt; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
