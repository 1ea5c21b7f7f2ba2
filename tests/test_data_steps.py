"""Ranking, retrieving, sampling, merging and checking data files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_encoder import save_bert
from tiny_tokenizers import plain_tokenizer

from blockrag.demo import forms
from blockrag.encoders import CorpusCounts, LexicalEncoder
from blockrag.encoders.contriever import ContrieverEncoder
from blockrag.errors import DataError, InputError
from blockrag.finetune.data.checking import Spread, check_file
from blockrag.finetune.data.lines import BlocksLine, Candidate, ChatLine, Line, Question, RagLine, write_lines
from blockrag.finetune.data.mixing import LineFile, merge_lines, sample_lines
from blockrag.finetune.data.ranking import corpus_index, rerank, retrieve, split_questions
from blockrag.finetune.samples import samples_of
from blockrag.passage import Passage

CAPITALS = {"Arvo": "Tellin", "Brask": "Onder", "Cend": "Umbra", "Dor": "Ulm", "Ephe": "Tor"}


def passages(*countries: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(Passage(country, f"Its capital is {CAPITALS[country]}.", country)) for country in countries)


def question(country: str, **fields: Any) -> Question:
    return Question(f"What is the capital of {country}?", (CAPITALS[country],), **fields)


LINE = RagLine(passages(*CAPITALS), (question("Cend", id="c"), question("Arvo")), id="l")


# -- ranking ----------------------------------------------------------------------------------------------------------


def test_a_line_becomes_one_line_for_each_question() -> None:
    lines = list(split_questions(LINE))
    assert [line.questions for line in lines] == [(one,) for one in LINE.questions]
    assert all(line.passages == LINE.passages and line.id == "l" for line in lines)


@pytest.fixture(scope="module")
def contriever(tmp_path_factory: pytest.TempPathFactory) -> ContrieverEncoder:
    return ContrieverEncoder(save_bert(tmp_path_factory.mktemp("bert")), device="cpu", max_tokens=48)


@pytest.mark.parametrize("titles", [False, True])
def test_candidates_are_ranked_by_the_dot_product(contriever: ContrieverEncoder, titles: bool) -> None:
    lines = list(rerank([LINE], contriever, top_k=3, titles=titles))
    assert len(lines) == 2
    for line in lines:
        scores = {}
        for one in LINE.passages:
            seen = one.passage if titles else Passage("x", one.passage.text)
            query = contriever.encode_queries([line.questions[0].question])[0]
            scores[one.passage.id] = float(np.dot(query, contriever.encode_passages([seen])[0]))
        best = sorted(scores, key=lambda name: -scores[name])[:3]
        assert [one.passage.id for one in line.passages] == best
        assert [one.score for one in line.passages] == pytest.approx([scores[name] for name in best], rel=1e-4)
        assert line.passages[0].passage.title  # what the encoder did not see is still there


def test_words_are_weighed_by_the_questions_own_candidates() -> None:
    (first, second) = rerank([LINE], LexicalEncoder(), top_k=2, titles=True)
    assert first.passages[0].passage.id == "Cend"
    assert second.passages[0].passage.id == "Arvo"
    encoder = LexicalEncoder()
    shown = [one.passage for one in LINE.passages]
    expected = encoder.score(LINE.questions[0].question, shown, CorpusCounts(encoder.passage_terms(shown)))
    assert first.passages[0].score == max(expected)


class WithoutRescoring:
    """The lexical encoder as one that only weighs its query by the corpus."""

    def __init__(self) -> None:
        self._encoder = LexicalEncoder(4096)
        self.name, self.dimension = "vectors", 4096
        self.encode_queries = self._encoder.encode_queries
        self.encode_passages = self._encoder.encode_passages
        self.passage_terms = self._encoder.passage_terms
        self.encode_queries_with = self._encoder.encode_queries_with


def test_so_they_are_for_encoders_without_a_score_of_their_own() -> None:
    (first, second) = rerank([LINE], WithoutRescoring(), top_k=1, titles=True)
    assert (first.passages[0].passage.id, second.passages[0].passage.id) == ("Cend", "Arvo")
    (exact, _) = rerank([LINE], LexicalEncoder(), top_k=1, titles=True)
    assert first.passages[0].score == pytest.approx(exact.passages[0].score, rel=0.2)


def test_orders() -> None:
    line = RagLine(passages("Dor", "Arvo", "Cend"), (question("Cend"),))
    found = {
        order: [
            one.passage.id for one in next(rerank([line], LexicalEncoder(), top_k=2, order=order, titles=True)).passages
        ]
        for order in ("best-first", "best-last", "given")
    }
    # Dor and Arvo score the same: the one given first is kept.
    assert found == {"best-first": ["Cend", "Dor"], "best-last": ["Dor", "Cend"], "given": ["Dor", "Cend"]}


def test_marks_are_kept_and_few_candidates_are_no_mistake() -> None:
    line = RagLine((Candidate(Passage("1", "Umbra"), supports=True),), (question("Cend"),))
    (ranked,) = rerank([line], LexicalEncoder())
    assert ranked.passages[0].supports is True
    (empty,) = rerank([RagLine((), (question("Arvo"),))], LexicalEncoder())
    assert empty.passages == ()
    with pytest.raises(InputError, match="top_k must be at least 1, got 0"):
        next(rerank([line], LexicalEncoder(), top_k=0))


def test_many_lines_are_each_ranked_alone(contriever: ContrieverEncoder) -> None:
    lines = [RagLine(passages(*random.Random(n).sample(list(CAPITALS), 3)), (question("Dor"),)) for n in range(70)]
    together = list(rerank(lines, contriever, top_k=2))
    for line, ranked in list(zip(lines, together, strict=True))[::23]:
        (alone,) = rerank([line], contriever, top_k=2)
        assert [one.passage for one in alone.passages] == [one.passage for one in ranked.passages]


# -- retrieving -------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = [{"id": c, "title": c, "text": f"The capital of {c} is {t}."} for c, t in CAPITALS.items()]
    path.write_text("".join(json.dumps(one) + "\n" for one in [*texts, {"id": "empty", "text": " "}]))
    return path


def test_questions_get_what_the_corpus_has(corpus: Path) -> None:
    asked = RagLine(passages("Ephe"), (question("Cend", id="c"), question("Arvo"), Question("Zyx?", ("x",))))
    with corpus_index(corpus, LexicalEncoder()) as index:
        assert len(index) == 5
        lines = list(retrieve([asked], index, top_k=2))
        backwards = list(retrieve([asked], index, top_k=2, order="best-last"))
        assert [one.score for one in lines[0].passages] == [
            hit.score for hit in index.search(asked.questions[0].question, 2)
        ]
    assert [line.questions for line in lines] == [(one,) for one in asked.questions]
    assert [[one.passage.id for one in line.passages][:1] for line in lines] == [["Cend"], ["Arvo"], []]
    assert [one.supports for one in lines[0].passages] == [True, False]
    assert [one.passages for one in backwards] == [line.passages[::-1] for line in lines]


def test_the_answer_is_compared_normalized(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps([{"text": "It is ruled by an Emperor, of course."}, {"text": "An emperor penguin."}]))
    asked = RagLine((), (Question("Which emperor rules?", ("The emperor of course!",)),))
    with corpus_index(path, LexicalEncoder()) as index:
        (line,) = retrieve([asked], index)
    assert {one.passage.text[:5]: one.supports for one in line.passages} == {"It is": True, "An em": False}


def test_a_bad_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"title": "no text"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: .+no string under 'text'"):
        corpus_index(tmp_path / "bad.jsonl", LexicalEncoder())
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="holds no passages"):
        corpus_index(tmp_path / "empty.json", LexicalEncoder())
    with pytest.raises(DataError, match="gone"):
        corpus_index(tmp_path / "gone.jsonl", LexicalEncoder())


# -- sampling and merging ---------------------------------------------------------------------------------------------


def rag_file(path: Path, name: str, n: int) -> Path:
    write_lines(path, [RagLine((), (Question(f"{name}{number}", ("a",)),)) for number in range(n)])
    # Blank lines count for nothing.
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\n\n", 3))
    return path


def chat_file(path: Path, n: int) -> Path:
    write_lines(
        path,
        [
            ChatLine(({"role": "user", "content": "q"}, {"role": "assistant", "content": f"chat{number}"}))
            for number in range(n)
        ],
    )
    return path


def names(lines: Any) -> list[str]:
    return [one.messages[-1]["content"] if isinstance(one, ChatLine) else one.questions[0].question for one in lines]


def test_lines_are_read_in_any_order(tmp_path: Path) -> None:
    with LineFile(rag_file(tmp_path / "a", "a", 7)) as lines:
        assert len(lines) == 7
        assert names([lines[5], lines[0], lines[6]]) == ["a5", "a0", "a6"]
    (tmp_path / "bad").write_text("\n\n{}\n")
    with LineFile(tmp_path / "bad") as lines, pytest.raises(DataError, match="bad, line 3: has the fields"):
        lines[0]
    with pytest.raises(DataError, match="holds no lines"):
        LineFile("/dev/null")
    with pytest.raises(DataError, match="cannot read"):
        LineFile(tmp_path / "gone")


def test_a_sample_is_that_of_random_sample(tmp_path: Path) -> None:
    path = rag_file(tmp_path / "a", "a", 50)
    random.seed(42)
    expected = random.sample([f"a{number}" for number in range(50)], 20)
    assert names(sample_lines(path, 20)) == expected
    assert names(sample_lines(path, 20, seed=1)) != expected
    with pytest.raises(InputError, match=r"cannot draw 51 lines from .+, which holds 50"):
        next(sample_lines(path, 51))


def test_merging_is_that_of_random_shuffle(tmp_path: Path) -> None:
    paths = [rag_file(tmp_path / "a", "a", 9), rag_file(tmp_path / "b", "b", 6)]
    expected = [f"a{number}" for number in range(9)] + [f"b{number}" for number in range(6)]
    assert names(merge_lines(paths, shuffle=False)) == expected
    random.seed(42)
    random.shuffle(expected)
    assert names(merge_lines(paths)) == expected


@pytest.mark.parametrize(("ratio", "wanted"), [(1.0, 10), (0.5, 5), (1.5, 15), (0.01, 1)])
def test_conversations_are_mixed_in(tmp_path: Path, ratio: float, wanted: int) -> None:
    path, chat = rag_file(tmp_path / "a", "a", 10), chat_file(tmp_path / "c", 20)
    mixed = names(merge_lines([path], chat=chat, chat_ratio=ratio))
    talk = [name for name in mixed if name.startswith("chat")]
    assert sorted(set(mixed) - set(talk)) == sorted(f"a{number}" for number in range(10))
    assert len(talk) == len(set(talk)) == wanted
    assert mixed == names(merge_lines([path], chat=chat, chat_ratio=ratio))


def test_conversations_are_drawn_and_then_all_are_shuffled(tmp_path: Path) -> None:
    path, chat = rag_file(tmp_path / "a", "a", 10), chat_file(tmp_path / "c", 30)
    random.seed(42)
    expected = [f"a{number}" for number in range(10)] + random.sample([f"chat{number}" for number in range(30)], 10)
    random.shuffle(expected)
    assert names(merge_lines([path], chat=chat)) == expected


def test_what_cannot_be_mixed(tmp_path: Path) -> None:
    path = rag_file(tmp_path / "a", "a", 10)
    with pytest.raises(InputError, match=r"cannot draw 10 lines from .+, which holds 9"):
        list(merge_lines([path], chat=chat_file(tmp_path / "c", 9)))
    for ratio in ("nan", "inf", "0"):
        with pytest.raises(InputError, match=f"chat_ratio must be a finite number above 0, got {ratio}"):
            list(merge_lines([path], chat=tmp_path / "c", chat_ratio=float(ratio)))
    with pytest.raises(DataError, match=r"b, line \d+: no conversation"):
        list(merge_lines([path], chat=rag_file(tmp_path / "b", "b", 10)))


# -- checking ---------------------------------------------------------------------------------------------------------


def test_a_file_is_counted(tmp_path: Path) -> None:
    lines: list[Line] = [
        RagLine(
            passages("Arvo", "Cend"), (question("Cend", kind="fact"), question("Brask", kind="fact", response="Onder!"))
        ),
        RagLine(passages("Dor"), (question("Dor"),)),
        RagLine((), (question("Dor"),)),
        ChatLine(({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})),
        BlocksLine(("a", "b"), "c"),
    ]
    write_lines(tmp_path / "a", lines)
    report = check_file(tmp_path / "a")
    assert report.forms == {"rag": 3, "chat": 1, "blocks": 1}
    assert report.kinds == {"fact": 2, "": 2}
    assert (report.questions, report.responses, report.with_passages, report.answerable) == (4, 1, 3, 2)
    assert report.passages == Spread(0, 1, 2, 2, 3)
    assert (report.tokens, report.errors, report.bad_lines) == (None, [], 0)


def test_tokens_are_those_of_training(tmp_path: Path) -> None:
    template, tokenizer = forms.template(), plain_tokenizer()
    lines = [LINE, RagLine(passages("Dor"), (question("Dor"),))]
    write_lines(tmp_path / "a", lines)
    samples = [next(samples_of(line, template, tokenizer, "here")) for line in lines]
    report = check_file(tmp_path / "a", template=template, tokenizer=tokenizer, max_tokens=samples[1].num_tokens)
    assert report.tokens is not None
    assert (report.tokens.least, report.tokens.most) == (samples[1].num_tokens, samples[0].num_tokens)
    # Two questions about the same passages: apart, they would need these twice.
    assert report.separate_tokens == report.tokens.total + samples[0].shared_tokens
    assert report.too_long == [1]


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    # Only the template knows that this one cannot be shown: nobody asked.
    talk = json.dumps({"messages": [{"role": "assistant", "content": "ho"}]})
    path = tmp_path / "a"
    path.write_text("\n".join(["{}", good, talk, *["nonsense"] * 25]))
    report = check_file(path, template=forms.template(), tokenizer=plain_tokenizer())
    assert report.bad_lines == 27
    assert len(report.errors) == 20
    assert report.errors[0].startswith(f"{path}, line 1: has the fields []")
    assert report.errors[1].startswith(f"{path}, line 3: message 1 is an answer without")
    assert report.forms == {"chat": 2}


def test_a_line_that_cannot_be_shown_counts_for_no_tokens(tmp_path: Path) -> None:
    talk = [("user", "hi"), ("assistant", "ho"), ("assistant", "and another thing")]
    good, bad = ({"messages": [{"role": role, "content": text} for role, text in some]} for some in (talk[:2], talk))
    (tmp_path / "a").write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    report = check_file(tmp_path / "a", template=forms.template(), tokenizer=plain_tokenizer())
    assert report.bad_lines == 1
    assert report.tokens is not None
    assert report.separate_tokens == report.tokens.total


def test_spread() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3]) == Spread(3, 3, 3, 3, 3)
    assert Spread.of(range(1, 101)) == Spread(1, 50.5, 95, 100, 5050)
