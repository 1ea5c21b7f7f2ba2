"""The sentence and question forms of the demo: the only wording the demo model ever reads.

The corpus of real countries (`build_corpus`) and the made-up countries of the training data (`synthetic`) are
written with these same forms, so that a very small model can be trained on the made-up ones and asked about the
real ones. Every form names its subject (the key repeated in each sentence is what lets a small model learn to look
facts up) and puts the value after the name (a causal model cannot attach a name to a value it has already passed).
Nothing here knows about tokens, models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockrag.prompt import PromptTemplate

__all__ = [
    "KINDS",
    "ORDER_QUESTIONS",
    "PASSAGE_TEMPLATE",
    "PREFIX",
    "QUERY_TEMPLATE",
    "QUESTION_FORMS",
    "SENTENCE_FORMS",
    "answer_text",
    "passage_block",
    "query_block",
    "question",
    "sentence",
    "template",
]

PREFIX = "Answer the question using the documents.\n"
"""Text of block 0; the tokenizer's BOS token stands before it."""

PASSAGE_TEMPLATE = "Title: {title}\n{text}\n"
"""Text of one passage block."""

QUERY_TEMPLATE = "Question: {question}\nAnswer:"
"""Text of the last block; the answer follows as `" " + answer` and the EOS token."""

SENTENCE_FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "capital": (
            "The capital of {name} is {value}.",
            "{name} has its capital at {value}.",
            "The government of {name} sits in {value}.",
        ),
        "region": ("{name} lies in {value}.", "On the map {name} is in {value}.", "{name} is a part of {value}."),
        "population": (
            "The population of {name} is about {value}.",
            "{name} has a population of {value}.",
            "The people of {name} number about {value}.",
        ),
        "area": (
            "The area of {name} is {value}.",
            "{name} covers {value}.",
            "The land of {name} measures {value}.",
        ),
        "language": (
            "The language of {name} is {value}.",
            "People in {name} speak {value}.",
            "Many voices in {name} talk in {value}.",
        ),
        "currency": (
            "People in {name} pay in {value}.",
            "The money of {name} is counted in {value}.",
            "Prices in {name} are given in {value}.",
        ),
        "peak": (
            "The highest point of {name} is {value}.",
            "{name} rises highest at {value}.",
            "The summit of {name} is {value}.",
        ),
        "internet": (
            "The internet code of {name} is {value}.",
            "Web addresses in {name} end in {value}.",
            "{name} has the internet code {value}.",
        ),
        "neighbor": (
            "{name} shares a border with {value}.",
            "A neighbor of {name} is {value}.",
            "The border of {name} touches {value}.",
        ),
    }
)
"""Phrasings of each kind of fact."""

QUESTION_FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "capital": ("What is the capital of {name}?", "Which city is the capital of {name}?"),
        "region": ("In which region is {name}?", "Which part of the world holds {name}?"),
        "population": ("What is the population of {name}?", "How many people live in {name}?"),
        "area": ("What is the area of {name}?", "How large is {name}?"),
        "language": ("What is the language of {name}?", "Which language is spoken in {name}?"),
        "currency": ("What is the currency of {name}?", "Which money is used in {name}?"),
        "peak": ("What is the highest point of {name}?", "Which is the highest place in {name}?"),
        "internet": ("What is the internet code of {name}?", "Which web ending belongs to {name}?"),
        "neighbor": ("Which country borders {name}?", "Which country is a neighbor of {name}?"),
    }
)
"""Phrasings of the question for each kind of fact; the name always comes last."""

ORDER_QUESTIONS: Mapping[str, str] = MappingProxyType(
    {
        "first": "Which place is described in the first document?",
        "last": "Which place is described in the last document?",
    }
)
"""Questions that only the order of the documents can answer; the answer is a title."""

KINDS: tuple[str, ...] = tuple(SENTENCE_FORMS)
"""The kinds of fact, in a fixed order."""


def sentence(kind: str, name: str, value: str, form: int) -> str:
    """Return one fact as a sentence.

    Args:
        kind: One of `KINDS`.
        name: The subject.
        value: What the question about this fact is answered with.
        form: Index into the kind's phrasings, taken modulo their number.
    """
    forms = SENTENCE_FORMS[kind]
    return forms[form % len(forms)].format(name=name, value=value)


def question(kind: str, name: str, form: int) -> str:
    """Return the question for one fact; the arguments are those of `sentence`."""
    forms = QUESTION_FORMS[kind]
    return forms[form % len(forms)].format(name=name)


def passage_block(title: str, text: str) -> str:
    """Return the text of a passage block."""
    return PASSAGE_TEMPLATE.format(title=title, text=text)


def query_block(question_text: str) -> str:
    """Return the text of the query block, up to where the answer begins."""
    return QUERY_TEMPLATE.format(question=question_text)


def answer_text(answer: str) -> str:
    """Return the answer as the model is trained to write it (the EOS token follows)."""
    return " " + answer


def template() -> PromptTemplate:
    """Return the prompt template of the demo checkpoint; its blocks are the texts above."""
    from blockrag.prompt import PromptTemplate, Turn

    return PromptTemplate(
        name="blockrag-demo",
        version=1,
        prefix="{bos}" + PREFIX,
        passage=PASSAGE_TEMPLATE,
        passage_untitled="{text}\n",
        query=QUERY_TEMPLATE,
        conversation_start="{bos}" + PREFIX,
        system=None,
        user=Turn("Question: ", "\n"),
        assistant=Turn("Answer: ", "\n"),
        generation="Answer:",
        follow_up_open="\n",
        follow_up_query=QUERY_TEMPLATE,
    )
