"""Splitting: the laws that hold for every text, tokenizer and size, and the ids of passages."""

import subprocess
import sys
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SENTENCES, chatml_tokenizer, llama3_tokenizer, plain_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blockrag.errors import DocumentError, InputError, PromptError
from blockrag.ingest import splitting
from blockrag.ingest.reading import Document
from blockrag.ingest.splitting import split_document, split_documents
from blockrag.passage import Passage
from blockrag.prompt import TEMPLATES, PromptTemplate


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Another family: probabilities instead of merges, a mark before the first word, a normalizer, unknown tokens."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>", "(a)"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", extra_special_tokens=["(a)"]
    )


TOKENIZERS = {
    "llama3": cache(llama3_tokenizer),
    "chatml": cache(chatml_tokenizer),
    "plain": cache(plain_tokenizer),
    "unigram": cache(unigram_tokenizer),
}

# What splitters trip over: separators of every level, characters of several tokens, control tokens as text.
FRAGMENTS = st.sampled_from(
    [
        "a",
        "the river ",
        "Hello ",
        "\n\n",
        "\n",
        "\n\n\n",
        ". ",
        "! ",
        "Dr. ",
        "é",
        "汉",
        "字",
        "。",
        "😀",
        "\t",
        " ",
        "\u3000",
        "x" * 30,
        "ﷺ",
        "<|eot_id|>",
        "<think>",
        "</s>",
        "\u200b",
        "1234567",
        "…",
        "ab.c",
        "\r",
        "\x1c",
        "\x00",
        "👩‍👩‍👧",
        "e\u0301",
    ]
)
TEXTS = st.one_of(st.lists(FRAGMENTS, max_size=60).map("".join), st.text(max_size=200))


def bare(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def count(tokenizer, text: str) -> int:
    """Tokens of a text in a prompt, by the public way there."""
    template = PromptTemplate(
        name="bare", version=1, prefix="", query="{question}", passage="{title}{text}", passage_untitled="{text}"
    )
    return len(template.passage_block(tokenizer, Passage("x", text)))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, max_tokens=st.sampled_from([1, 2, 5, 12, 40, 300]))
@settings(max_examples=40, deadline=None)
def test_laws(name, text, max_tokens):
    tokenizer = TOKENIZERS[name]()
    document = Document("d", text, "T")
    (passages,) = split_documents([document], tokenizer, max_tokens=max_tokens)
    if isinstance(passages, DocumentError):
        # The one way to fail: a single character that does not fit.
        assert "alone has" in str(passages)
        assert any(count(tokenizer, character) > max_tokens for character in bare(text))
        return
    assert all(count(tokenizer, passage.text) <= max_tokens for passage in passages)
    assert bare("".join(passage.text for passage in passages)) == bare(text)
    assert all(bare(passage.text) for passage in passages)
    assert passages == split_document(document, tokenizer, max_tokens=max_tokens)
    ids = [passage.id for passage in passages]
    assert ids == (["d"] if len(ids) == 1 else [f"d#{number}" for number in range(len(ids))])
    assert {(passage.document_id, passage.title) for passage in passages} <= {("d", "T")}


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "0123456789abcdef" * 2000,
        "." * 30_000,
        "a\n" * 15_000,
        "汉" * 10_000,
        "😀" * 8_000,
        "ab, " * 8_000,
    ],
    ids=["letter", "digits", "dots", "lines", "chinese", "emoji", "commas"],
)
def test_long_texts_without_structure(text):
    tokenizer = plain_tokenizer()
    passages = split_document(Document("d", text), tokenizer, max_tokens=256)
    assert bare("".join(passage.text for passage in passages)) == bare(text)
    assert max(count(tokenizer, passage.text) for passage in passages) <= 256


def test_the_number_of_tokenized_characters_grows_with_the_length_of_the_text(monkeypatch):
    """Linear work, counted rather than timed: a document four times as long is tokenized at most five times as much."""
    tokenizer = plain_tokenizer()
    tokenized = 0
    counted = splitting._count

    def recording(tokenizer, texts):
        nonlocal tokenized
        tokenized += sum(map(len, texts))
        return counted(tokenizer, texts)

    monkeypatch.setattr(splitting, "_count", recording)
    work = []
    for size in (20_000, 80_000):
        for text in ("a" * size, "The river runs to the sea. " * (size // 27)):
            tokenized = 0
            split_document(Document("d", text), tokenizer, max_tokens=64)
            work.append(tokenized)
    assert work[2] <= 5 * work[0]
    assert work[3] <= 5 * work[1]


def test_cuts_fall_between_paragraphs_then_sentences_then_words():
    tokenizer = plain_tokenizer(vocab_size=2000)
    sentence = "The river runs from the lake to the sea."
    length = count(tokenizer, sentence)
    paragraphs = "\n\n".join([f"{sentence} {sentence}"] * 4)
    by_paragraph = split_document(Document("d", paragraphs), tokenizer, max_tokens=3 * length)
    assert [passage.text for passage in by_paragraph] == [f"{sentence} {sentence}"] * 4
    by_sentence = split_document(Document("d", paragraphs), tokenizer, max_tokens=length + 2)
    assert [passage.text for passage in by_sentence] == [sentence] * 8
    by_word = split_document(Document("d", sentence.replace(".", "")), tokenizer, max_tokens=length // 2)
    assert " ".join(passage.text for passage in by_word) == sentence.replace(".", "")


def test_without_a_tokenizer_four_bytes_are_a_token():
    text = "The river runs to the sea. " * 50
    passages = split_document(Document("d", text), None, max_tokens=20)
    assert max(len(passage.text.encode()) for passage in passages) <= 80
    assert bare("".join(passage.text for passage in passages)) == bare(text)


def test_white_space_only_gives_no_passage():
    assert split_document(Document("d", " \n\t\u3000\r\n ", "T"), plain_tokenizer()) == []
    assert split_document(Document("d", " \n" * 200_000, "T"), plain_tokenizer()) == []


def test_a_line_of_a_passage_corpus_keeps_its_id_title_and_metadata():
    document = Document("12#0", " The river. ", "River", {"lang": "en"})
    assert split_document(document, plain_tokenizer()) == [
        Passage("12#0", "The river.", "River", "12#0", {"lang": "en"})
    ]


def test_documents_cut_by_the_caller_are_left_alone():
    passages = (Passage("a", "one " * 1000, "T", "d"), Passage("b", "", "", "d"))
    assert split_document(Document("d", "", passages=passages), plain_tokenizer(), max_tokens=5) == list(passages)


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_a_change_moves_the_cuts_of_its_section_only(separator):
    """Even where all paragraphs have one length, so that filling alone would never fall into step again."""
    tokenizer = plain_tokenizer()
    paragraphs = [f"The river runs to the sea, number {number * 7919 % 90001 + 10000}." for number in range(600)]
    before = {p.text for p in split_document(Document("d", separator.join(paragraphs)), tokenizer, max_tokens=60)}
    for place in (0, 100, 400):
        changed = [*paragraphs[:place], "Something new.", *paragraphs[place:]]
        after = {p.text for p in split_document(Document("d", separator.join(changed)), tokenizer, max_tokens=60)}
        assert len(after - before) <= 40 < len(after) / 4


def test_sections_lose_nothing_and_are_bounded(monkeypatch):
    monkeypatch.setattr(splitting, "_MAX_SECTION_CHARACTERS", 100)
    for separator in ("\n\n", "\n", " ", ""):
        text = separator.join(["word" * 8] * 40)
        sections = list(splitting._sections(text, 10_000))
        assert "".join(sections) == text
        assert max(map(len, sections)) <= 100
        assert all(section.startswith(separator) for section in sections[1:])
    text = "\n\n".join(str(number) * 10 for number in range(3000))
    sections = list(splitting._sections(text, 1000))
    assert "".join(sections) == text
    assert len(sections) > len(text) / 2000


def test_control_tokens_in_text_count_as_the_plain_text_they_will_be():
    tokenizer = llama3_tokenizer()
    text = "<|eot_id|>" * 20
    assert count(tokenizer, text) > 100
    passages = split_document(Document("d", text), tokenizer, max_tokens=50)
    assert bare("".join(passage.text for passage in passages)) == text
    assert max(count(tokenizer, passage.text) for passage in passages) <= 50


def test_one_failing_document_of_several_fails_alone():
    tokenizer = unigram_tokenizer()
    documents = [
        Document("good", "text"),
        Document("bad", "a \u249c that the normalizer turns into the control token (a)"),
        Document("title", "text", "word " * 500),
        Document("long", "The river. " * 200),
    ]
    good, bad, title, long = split_documents(documents, tokenizer, max_tokens=100)
    assert [passage.id for passage in good] == ["good"]
    assert isinstance(bad, PromptError)
    assert isinstance(title, DocumentError)
    assert "its title has" in str(title)
    assert len(long) > 1
    with pytest.raises(PromptError):
        split_document(documents[1], tokenizer)


@pytest.mark.parametrize("max_tokens", [0, -3])
def test_sizes_without_room_are_refused(max_tokens):
    with pytest.raises(InputError, match=f"max_tokens is {max_tokens}"):
        split_document(Document("d", "text"), plain_tokenizer(), max_tokens=max_tokens)


def test_a_character_that_cannot_fit_is_named():
    with pytest.raises(DocumentError, match="'😀' alone has 4 tokens, more than a passage's 3"):
        split_document(Document("d", "a 😀"), plain_tokenizer(), max_tokens=3)


def test_short_documents_do_not_import_llama_index():
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from tiny_tokenizers import plain_tokenizer\n"
        "from blockrag.ingest import Document, split_document\n"
        "assert split_document(Document('d', 'short'), plain_tokenizer())\n"
        "print('llama_index.core' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_length_is_the_length_in_the_prompt():
    """Counted by the same function: a passage block is its markup and at most `max_tokens` tokens of text."""
    tokenizer = llama3_tokenizer()
    template = next(iter(TEMPLATES.values()))
    markup = len(template.passage_block(tokenizer, Passage("x", "", "")))
    for passage in split_document(Document("d", "The river runs. " * 300), tokenizer, max_tokens=50):
        assert len(template.passage_block(tokenizer, passage)) <= 50 + markup + 2
