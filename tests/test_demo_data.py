"""The embedded demo: corpus, questions, made-up training data, and the checkpoint itself."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys

import pytest
import torch

from blockrag import demo
from blockrag.demo import build_corpus, forms
from blockrag.demo.contexts import real_contexts, real_facts
from blockrag.demo.synthetic import Context, RealFact, World, in_split, words
from blockrag.errors import InputError
from blockrag.finetune.demo.lines import context_line
from blockrag.finetune.samples import samples_of
from blockrag.finetune.scoring import Mode, score
from blockrag.model.loading import load_pretrained
from blockrag.model.profile import structure_of


@pytest.fixture(scope="module")
def facts() -> list[RealFact]:
    return real_facts()


# -- Corpus and questions -----------------------------------------------------------------------------------------


def test_corpus_is_short_passages_about_one_place_each():
    corpus = demo.load_corpus()
    assert 230 <= len(corpus) <= 260
    assert len({passage.id for passage in corpus}) == len({passage.title for passage in corpus}) == len(corpus)
    for passage in corpus:
        sentences = re.findall(r"[^.]*(?:\.[^ ][^.]*)*\.(?: |$)", passage.text)
        assert passage.text.count(passage.title) >= 4, passage
        assert 4 <= len(sentences) <= 6, passage
        assert not re.search(r"[()%<>;]|note|\d{4} est", passage.text), passage


def test_every_answer_stands_in_its_passage_and_every_question_names_its_place():
    corpus = {passage.id: passage for passage in demo.load_corpus()}
    for row in demo.load_questions():
        passage = corpus[row.passage_id]
        assert row.kind in forms.KINDS
        assert row.question in {forms.question(row.kind, passage.title, form) for form in range(2)}
        stated = {forms.sentence(row.kind, passage.title, row.answer, form) for form in range(3)}
        assert sum(text in passage.text for text in stated) == 1, row
        assert 1 <= len(row.answer.split()) <= 5


def test_questions_can_be_filtered_by_held_out():
    every, held, seen = demo.load_questions(), demo.load_questions(True), demo.load_questions(False)
    assert len(held) + len(seen) == len(every) > 1300
    held_ids = {row.passage_id for row in held}
    assert len(held_ids) == build_corpus.HELD_OUT
    assert held_ids.isdisjoint(row.passage_id for row in seen)


def test_importing_the_demo_is_light():
    script = "import sys, blockrag.demo as d; d.load_corpus(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_checkpoint_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        demo.checkpoint_path()


# -- Building the corpus ------------------------------------------------------------------------------------------


def _entry(name: str, **changes: str) -> dict:
    values = {
        "capital": "Alpha City (on Alpha Island); note - moved in 1999",
        "location": "Southern Asia, east of something",
        "population": "1,419,316,933 (2025 est.)",
        "area": "38,394 sq km",
        "language": "Nubian 50%, Alphish (official, also Alpha) 40%, other 10%",
        "currency": "Alphan dinars (ALD) per US dollar -",
        "peak": "Mount &Eacute;toile on Ridge 2,908 m",
        "code": ".al",
        "border": "Gamma 12 km; US 1,300 km (of which 5 km is a lake)",
    } | changes
    text = {key: {"text": value} for key, value in values.items()}
    return {
        "Government": {
            "Country name": {"conventional short form": {"text": name}, "conventional long form": {"text": "none"}},
            "Capital": {"name": text["capital"]},
        },
        "Geography": {
            "Location": text["location"],
            "Area": {"total ": text["area"]},
            "Elevation": {"highest point": text["peak"]},
            "Land boundaries": {"border countries": text["border"]},
        },
        "People and Society": {"Population": {"total": text["population"]}, "Languages": text["language"]},
        "Economy": {"Exchange rates": {"Currency": text["currency"]}},
        "Communications": {"Internet country code": text["code"]},
    }


def test_values_are_cleaned():
    (country,) = build_corpus.countries({"africa/al.json": _entry("Alpha")})
    assert country.facts == {
        "capital": "Alpha City",
        "region": "Southern Asia",
        "population": "1.4 billion",
        "area": "38 thousand sq km",
        "language": "Alphish",
        "currency": "Alphan dinars",
        "peak": "Mount Étoile",
        "internet": ".al",
        "neighbor": "United States",
    }


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("capital", {"capital": "none; administered from London"}),
        ("capital", {"capital": "time zone 5"}),
        ("region", {"location": "somewhere, in the ocean"}),
        ("population", {"population": "uninhabited"}),
        ("population", {"population": "50 (2021)"}),
        ("area", {"area": "unknown"}),
        ("language", {"language": "many local languages"}),
        ("currency", {"currency": "a/b per US dollar"}),
        ("currency", {"currency": "see entry for elsewhere"}),
        ("peak", {"peak": "unnamed elevation 50 m"}),
        ("peak", {"peak": "As Sarawat range, 3,000 m"}),
        ("internet", {"code": "none"}),
        ("neighbor", {"border": ""}),
        ("capital", {"capital": "Alpha"}),
    ],
)
def test_what_cannot_be_cleaned_is_left_out(kind, change):
    (country,) = build_corpus.countries({"africa/al.json": _entry("Alpha", **change)})
    assert kind not in country.facts
    assert len(country.facts) == 8


@pytest.mark.parametrize(
    ("change", "kind", "value"),
    [
        ({"currency": "<p>the US dollar is used</p>"}, "currency", "US dollars"),
        ({"currency": "Communaute francs (XOF) per US dollar"}, "currency", "West African CFA francs"),
        ({"location": "Caribbean, an island"}, "region", "the Caribbean"),
        ({"area": "1.284 million sq km"}, "area", "1.3 million sq km"),
    ],
)
def test_special_values(change, kind, value):
    (country,) = build_corpus.countries({"africa/al.json": _entry("Alpha", **change)})
    assert country.facts[kind] == value


def test_oceans_nameless_and_poor_entries_are_skipped_and_names_are_unique():
    poor = {"Government": {"Country name": {"conventional short form": {"text": "Poor"}}}}
    entries = {"oceans/x.json": _entry("Sea"), "a/b.json": _entry("none"), "a/c.json": poor}
    entries |= {"a/d.json": _entry("Twin"), "a/e.json": _entry("Twin"), "a/f.json": _entry("DRC")}
    names = [country.name for country in build_corpus.countries(entries)]
    assert names == ["Democratic Republic of the Congo", "Twin"]


def test_language_given_as_an_object():
    entry = _entry("Alpha")
    entry["People and Society"]["Languages"] = {"Languages": {"text": "Betan (official) less than 1%"}}
    assert build_corpus.countries({"a/b.json": entry})[0].facts["language"] == "Betan"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (7, "7"),
        (474, "470"),
        (999, "1 thousand"),
        (1_690, "1.7 thousand"),
        (38_394, "38 thousand"),
        (999_999, "1 million"),
        (8_925_741, "8.9 million"),
        (114_000_000, "110 million"),
        (2e9, "2 billion"),
        (0, "0"),
    ],
)
def test_round_number(number, text):
    assert build_corpus.round_number(number) == text


def test_the_builder_writes_the_same_bytes_again(tmp_path):
    names = [f"Land{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    entries = {f"africa/{name}.json": _entry(name) for name in names}
    source = tmp_path / "facts.json.gz"
    source.write_bytes(gzip.compress(json.dumps(entries).encode()))
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        build_corpus.main([str(source), "--out", str(folder)])
        written.append([(folder / name).read_bytes() for name in ("corpus.jsonl", "questions.jsonl")])
    assert written[0] == written[1]
    assert written[0][0].count(b"\n") == len(names)


def test_too_few_countries_for_the_held_out_set():
    with pytest.raises(InputError, match="only 1 usable"):
        build_corpus.build({"africa/al.json": _entry("Alpha")})


# -- Made-up training data ----------------------------------------------------------------------------------------


def _draw(facts, split, seed, count, **options) -> list[Context]:
    world = World(facts, split=split, seed=seed)
    return [world.context(passages=1 + number % 8, **options) for number in range(count)]


def _text(contexts: list[Context]) -> str:
    lines = [f"{title}\n{text}" for context in contexts for title, text in context.passages]
    lines += [f"{row.question} {row.answer}" for context in contexts for row in context.questions]
    return "\n".join(lines)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_same_seed_draws_the_same_contexts(facts, split):
    assert _draw(facts, split, 3, 12) == _draw(facts, split, 3, 12)
    assert _draw(facts, split, 3, 12) != _draw(facts, split, 4, 12)


def test_what_is_drawn_does_not_depend_on_the_process():
    script = (
        "from blockrag.demo.synthetic import RealFact, World;"
        "facts = [RealFact(name='Land' + c, kind='capital', value='City' + c, held_out=c < 'c') for c in 'abcdefgh'];"
        "world = World(facts, split='train', seed=0);"
        "print([world.context(passages=4) for _ in range(10)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_training_never_holds_held_out_countries_or_values_only_they_have(facts):
    contexts = _draw(facts, "train", 0, 200)
    text = _text(contexts).casefold()
    names = {fact.name.casefold() for fact in facts if fact.held_out}
    assert len(names) == build_corpus.HELD_OUT
    for name in names:
        assert not re.search(rf"\b{re.escape(name)}\b", text), name
    shared = {value.casefold() for fact in facts if not fact.held_out for value in (fact.name, fact.value)}
    only_held_out = {fact.value.casefold() for fact in facts if fact.held_out} - shared
    assert len(only_held_out) > 150
    answers = {row.answer.casefold() for context in contexts for row in context.questions}
    assert answers.isdisjoint(only_held_out)
    for value in (value for value in only_held_out if not re.search(r"\d|^\.", value)):
        assert not re.search(rf"\b{re.escape(value)}\b", text), value


def test_training_mixes_in_countries_that_are_not_held_out_and_the_test_split_does_not(facts):
    real = {fact.name for fact in facts}
    assert real & {title for context in _draw(facts, "train", 0, 100) for title, _ in context.passages}
    assert not real & {title for context in _draw(facts, "test", 0, 100) for title, _ in context.passages}


def test_names_of_the_splits_are_disjoint(facts):
    train, test = (
        {title for context in _draw(facts, split, 0, 100) for title, _ in context.passages}
        for split in ("train", "test")
    )
    assert train.isdisjoint(test)
    # Names of one word show the split of that word; "ia" may have been added to another one.
    for split, names in (("train", train - {fact.name for fact in facts}), ("test", test)):
        single = [name for name in names if re.fullmatch(r"\w+", name) and not name.endswith("ia")]
        assert len(single) > 40
        assert all(in_split(name, split) for name in single)


def test_a_word_belongs_to_exactly_one_split():
    found = [f"Word{number}" for number in range(2000)]
    tests = [word for word in found if in_split(word, "test")]
    assert all(in_split(word, "test") != in_split(word, "train") for word in found)
    assert 150 < len(tests) < 350
    assert in_split("Abc", "test") == in_split("aBC", "test")


def test_every_answer_of_a_context_can_be_read_in_it(facts):
    for context in _draw(facts, "train", 1, 60):
        texts = dict(context.passages)
        assert len(texts) == len(context.passages)
        for row in context.questions:
            if row.kind in forms.ORDER_QUESTIONS:
                assert row.answer == context.passages[0 if row.kind == "first" else -1][0]
                continue
            name = next(
                name for name in texts for form in range(2) if row.question == forms.question(row.kind, name, form)
            )
            assert any(forms.sentence(row.kind, name, row.answer, form) in texts[name] for form in range(3))


def test_about_one_question_in_ten_is_about_order(facts):
    kinds = [row.kind for context in _draw(facts, "train", 2, 200, questions=16) for row in context.questions]
    assert 0.07 < sum(kind in forms.ORDER_QUESTIONS for kind in kinds) / len(kinds) < 0.14


def test_words_are_varied(facts):
    text = _text(_draw(facts, "train", 0, 200))
    assert len(set(words(text))) > 3000
    assert re.search(r"[áéíóúãõâêôçñüšž]", text)
    assert re.search(r"\w-\w", text)


def test_a_generator_without_real_facts_still_works():
    context = World([], split="train", seed=0).context(passages=3)
    assert len(context.passages) == 3


@pytest.mark.parametrize(("split", "passages"), [("dev", 1), ("train", 0), ("train", -1)])
def test_impossible_requests_are_refused(split, passages):
    with pytest.raises(InputError):
        World([], split=split, seed=0).context(passages=passages)


# -- The checkpoint -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint():
    """The model, its tokenizer and its facts, loaded as training loads them."""
    return load_pretrained("demo", device=torch.device("cpu"), dtype=torch.float32, revision=None)


def test_numbers_of_two_digits_are_single_tokens_and_any_text_survives(checkpoint):
    tokenizer = checkpoint[1].backend_tokenizer
    for number in (10, 47, 99, 4.7, 9.9):
        assert tokenizer.encode(str(number)).tokens == [str(number)]
    for text in ("1.42.3 and 12345\n\n  .x\u2028Ångström'll 東京 \U0001f600", " ", "4.75", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_checkpoint_loads_offline_with_plain_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo.checkpoint_path()
    assert AutoModelForCausalLM.from_pretrained(path, local_files_only=True).config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(path, local_files_only=True).eos_token == "<eos>"
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) < 16 << 20


def test_the_facts_say_how_the_demo_prompts(checkpoint):
    _, _, facts = checkpoint
    assert facts.block_fine_tuned is True
    assert facts.template.prefix.endswith(forms.PREFIX)
    assert (facts.template.passage, facts.template.query) == (forms.PASSAGE_TEMPLATE, forms.QUERY_TEMPLATE)
    assert facts.max_blocks >= 9
    assert facts.max_tokens > 1000


@pytest.mark.parametrize("mode", ["block", "full"])
def test_the_checkpoint_answers_questions_about_countries_it_never_saw(checkpoint, mode: Mode):
    model, tokenizer, facts = checkpoint
    lines = [context_line(context) for context in real_contexts(held_out=True, passages=4, seed=1)[:10]]
    samples = [sample for line in lines for sample in samples_of(line, facts.template, tokenizer, "here")]
    right = [one.right for scores in score(model, structure_of(model), samples, mode, pad_id=0) for one in scores]
    assert len(right) > 45
    assert sum(right) / len(right) > 0.8
