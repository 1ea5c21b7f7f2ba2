"""Questions over several passages of the demo corpus, and the corpus's facts as the generator takes them."""

from __future__ import annotations

import random

from blockrag.demo import forms, load_corpus, load_questions
from blockrag.demo.synthetic import Context, QuestionAnswer, RealFact

__all__ = ["real_contexts", "real_facts"]


def real_facts() -> list[RealFact]:
    """Return the facts of the demo corpus as the generator takes them."""
    titles = {passage.id: passage.title for passage in load_corpus()}
    return [
        RealFact(name=titles[row.passage_id], kind=row.kind, value=row.answer, held_out=row.held_out)
        for row in load_questions()
    ]


def real_contexts(
    *, held_out: bool | None, passages: int = 5, seed: int = 7, similar: bool = False, order: bool = False
) -> list[Context]:
    """Return one context for each passage of the demo corpus: that passage among others, and the questions about it.

    Args:
        held_out: Ask about held-out countries (True), about the others (False) or about all (None); the other
            passages of a context come from the whole corpus.
        passages: Number of passages, the one asked about among them at a random place.
        seed: Draws the other passages and the order.
        similar: Take the passages that share most words with the one asked about, instead of random ones.
        order: Also ask which place the first and the last document describe.
    """
    rng = random.Random(seed)
    corpus = load_corpus()
    words = {passage.id: set(f"{passage.title} {passage.text}".split()) for passage in corpus}
    asked: dict[str, list[QuestionAnswer]] = {}
    for row in load_questions(held_out):
        asked.setdefault(row.passage_id, []).append(QuestionAnswer(row.question, row.answer, row.kind))
    contexts = []
    for gold in (passage for passage in corpus if passage.id in asked):
        others = [passage for passage in corpus if passage.id != gold.id]
        if similar:
            alike = {other.id: len(words[other.id] & words[gold.id]) / len(words[other.id]) for other in others}
            others = sorted(others, key=lambda other: (-alike[other.id], other.id))[: passages - 1]
        chosen = [gold, *rng.sample(others, passages - 1)]
        rng.shuffle(chosen)
        ends = (("first", chosen[0].title), ("last", chosen[-1].title)) if order else ()
        questions = asked[gold.id] + [
            QuestionAnswer(forms.ORDER_QUESTIONS[which], title, which) for which, title in ends
        ]
        texts = tuple((passage.title, passage.text) for passage in chosen)
        contexts.append(Context(passages=texts, questions=tuple(questions)))
    return contexts
