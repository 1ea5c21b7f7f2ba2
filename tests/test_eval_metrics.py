"""The metrics of answers, against values worked out by hand and the edge cases of the published code."""

from __future__ import annotations

import pytest

from blockrag.errors import InputError
from blockrag.evaluation.metrics import (
    METRICS,
    exact_match,
    normalize_answer,
    recall_at_k,
    score,
    substring_match,
    supporting,
    token_f1,
    union_f1,
)
from blockrag.finetune.data.lines import Candidate
from blockrag.passage import Passage


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("an apple a day", "apple day"),
        ("theatre and Anna", "theatre and anna"),
        ("the-end", "theend"),
        ("10 a.m.", "10 am"),
        ("\tÉmile\u00a0Zola\n", "émile zola"),
        ("STRASSE Straße", "strasse straße"),
        ("“quoted”", "“quoted”"),
        ("東京タワー。", "東京タワー。"),
        ("The The", ""),
        ("!?", ""),
        ("", ""),
    ],
)
def test_normalizing(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_exact_match() -> None:
    assert exact_match("The Eiffel Tower.", ["Louvre", "eiffel tower"])
    assert not exact_match("Eiffel Tower in Paris", ["eiffel tower"])
    assert not exact_match("", ["eiffel tower"])


def test_exact_match_where_the_norm_is_empty_compares_the_texts() -> None:
    assert exact_match(" a ", ["A"])
    assert exact_match("The The", ["the the"])
    assert not exact_match("the", ["A"])
    assert not exact_match("", ["!"])


def test_substring_match_is_of_characters_as_published() -> None:
    assert substring_match("It is the Eiffel Tower, I think.", ["Eiffel tower"])
    assert substring_match("I know", ["no"])
    assert substring_match("Mount\nKenya", ["mount kenya"])
    assert not substring_match("Eiffel", ["eiffel tower"])


def test_an_answer_of_which_nothing_is_left_is_found_nowhere() -> None:
    assert not substring_match("anything", ["the"])
    assert not substring_match("", ["!"])
    assert substring_match("yes", ["!", "yes"])


def test_token_f1_counts_words_as_often_as_they_occur() -> None:
    # Prediction: new new york city (4 words), gold: new york (2): common 2, precision 1/2, recall 1.
    assert token_f1("New New York City", ["the New York"]) == pytest.approx(2 * 0.5 * 1 / 1.5)
    # Best over the answers: "york" alone has precision 1/4, recall 1 and 0.4.
    assert token_f1("New New York City", ["york", "new york"]) == pytest.approx(2 / 3)
    assert token_f1("Paris", ["London"]) == 0
    assert token_f1("", ["London"]) == 0
    assert token_f1("the", ["the"]) == 0


def test_union_f1_is_against_all_answers_together() -> None:
    # Set {new, york, city} against {new, york, nyc}: 2 common, precision 2/3, recall 2/3.
    assert union_f1("New New York City", ["New York", "NYC"]) == pytest.approx(2 / 3)
    assert token_f1("NYC", ["New York", "NYC"]) == 1
    # One of three words: precision 1, recall 1/3.
    assert union_f1("NYC", ["New York", "NYC"]) == pytest.approx(0.5)
    assert union_f1("Oslo", ["New York"]) == 0


def test_all_scores_of_one_answer() -> None:
    scores = score("It is Paris", ["Paris"])
    assert scores.as_json() == {"em": 0.0, "substr_em": 1.0, "f1": 0.5, "union_f1": 0.5}
    assert tuple(scores.as_json()) == METRICS


@pytest.mark.parametrize("metric", [exact_match, substring_match, token_f1, union_f1, score])
@pytest.mark.parametrize("answers", [[], "Paris"])
def test_answers_must_be_a_list_with_something_in_it(metric, answers) -> None:
    with pytest.raises(InputError, match="list of at least one string"):
        metric("Paris", answers)


def _candidate(text: str, supports: bool | None = None, title: str = "") -> Candidate:
    return Candidate(Passage(id="1", title=title, text=text), supports=supports)


def test_support_is_the_mark_of_the_data_where_there_is_one() -> None:
    passages = [_candidate("Paris is here"), _candidate("nothing", supports=True), _candidate("Paris", supports=False)]
    assert supporting(passages, ["Paris"]) == ((False, True, False), "flag")


def test_support_is_the_answer_in_the_passage_where_there_is_no_mark() -> None:
    passages = [_candidate("It is the capital.", title="Paris"), _candidate("London"), _candidate("In PARIS, France.")]
    assert supporting(passages, ["paris"]) == ((True, False, True), "answer")
    assert supporting([], ["paris"]) == ((), "answer")


def test_recall() -> None:
    supports = [(False, True), (True, False), (False, False), ()]
    assert recall_at_k(supports, 1) == 0.25
    assert recall_at_k(supports, 2) == recall_at_k(supports, 10) == 0.5
    with pytest.raises(InputError, match="0 questions"):
        recall_at_k([], 1)
    with pytest.raises(InputError, match="k=0"):
        recall_at_k(supports, 0)
