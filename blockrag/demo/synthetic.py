"""Made-up countries: the training and test data of the demo model.

A `World` draws contexts (a few passages and questions about them) whose names, values and numbers are invented, in
the forms of `forms`. It owns three guarantees, which tests check:

- the same seed gives the same contexts, on every machine (no salted hashing);
- the invented words of the "train" and the "test" split are disjoint: a word belongs to one split by its own hash;
- no context holds the name of a held-out country, nor a value that only held-out countries have, nor (for invented
  words) any word of a real country's name or value. Words that held-out countries share with others ("euros",
  "Spanish", "Caribbean", "Islands") do occur.

The train split also mixes in names and values of the countries that are not held out, shuffled, so that a passage
never states a true fact on purpose; the test split holds invented words only. Nothing here knows about tokens.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from blockrag.demo import forms
from blockrag.demo.build_corpus import round_number
from blockrag.errors import InputError

__all__ = ["Context", "QuestionAnswer", "RealFact", "World", "in_split", "words"]

Split = Literal["train", "test"]

_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "y",
    "z",
    "br",
    "ch",
    "dr",
    "fr",
    "gr",
    "kh",
    "kr",
    "ky",
    "ng",
    "nd",
    "mb",
    "ph",
    "pl",
    "sh",
    "sk",
    "st",
    "th",
    "tr",
    "ts",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "aa", "ai", "au", "ea", "ia", "ie", "io", "oa", "ou", "ue"]
_CODAS = ["", "", "", "", "n", "r", "s", "l", "m", "k", "t", "d", "ng", "nd", "st", "sh", "x", "z", "rg", "lt"]
_SYLLABLES = [onset + vowel for onset in "bdfgklmnprstvz" for vowel in "aeiou"]
_ENDINGS = ["", "", "", "a", "ia", "land", "stan", "o", "es", "on", "ea", "ana", "is", "ru"]
_ACCENTS = {"a": "áãâà", "e": "éèê", "i": "íî", "o": "óôõö", "u": "úü", "c": "ç", "n": "ñ", "s": "š", "z": "ž"}
_PLACES = ["{}", "{}", "{}", "{}", "{}", "{} {}", "{} {}", "{} and {}", "{}-{}", "Saint {}", "{} Islands", "New {}"]
_PLACES += ["North {}", "South {}", "East {}", "West {}", "Republic of {}", "United {}", "Port {}", "{} Island"]
_GENERIC = r"\b(and|the|of|Saint|New|North|South|East|West|Republic|United|Port|Islands?|Northern|Southern|Central)\b"
_CITIES = ["{}", "{}", "{}", "{}", "{}", "{}", "{} {}", "{} {}", "Port {}", "{} City", "San {}", "{} Town", "{}-{}"]
_CITIES += ["Saint {}", "{} de {}", "{}'{}"]
_PEAKS = ["{}", "{}", "{} {}", "{} {}", "Mount {}", "Mount {}", "{} Peak", "Monte {}", "Mont {}", "Pico {}", "{} Hill"]
_PEAKS += ["Cerro {}", "Gora {}", "Jabal {}", "Volcan {}", "Pic {}", "{} de {}", "Mount {} {}", "{} Mountain"]
_LANGUAGES = ["{}", "{}", "{}ish", "{}ese", "{}ian", "{}i", "{} {}", "Old {}", "{} Creole"]
_UNITS = ["dollars", "pounds", "francs", "dinars", "pesos", "rupees", "crowns", "shillings", "rials", "rubles", "lei"]
_REGIONS = ["Northern {}", "Southern {}", "Eastern {}", "Western {}", "Central {}", "{}", "the {}", "the {} Sea"]


@dataclass(frozen=True, slots=True)
class RealFact:
    """A fact of the demo corpus, as `World` needs it to mix in and to keep out.

    Args:
        name: The country.
        kind: One of `forms.KINDS`.
        value: The answer.
        held_out: The country must not occur in training.
    """

    name: str
    kind: str
    value: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """One question about a context; `kind` is one of `forms.KINDS`, or "first"/"last" (order questions)."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True)
class Context:
    """Passages as (title, text) in prompt order, and questions about them."""

    passages: tuple[tuple[str, str], ...]
    questions: tuple[QuestionAnswer, ...]


def words(text: str) -> list[str]:
    """Return the capitalized words of `text`, lower-cased: the parts of a name that identify something."""
    return [word.casefold() for word in re.findall(r"[^\W\d_]+", text) if word[0].isupper()]


def in_split(word: str, split: Split) -> bool:
    """Say whether an invented word belongs to `split`: one in eight (by its BLAKE2 hash) is a test word."""
    is_test = hashlib.blake2b(word.casefold().encode(), digest_size=1).digest()[0] % 8 == 0
    return is_test == (split == "test")


class World:
    """An endless source of contexts.

    Args:
        facts: The demo corpus's facts; held-out ones are kept out, the others may be mixed in (train split only).
        split: Which half of the invented words to use.
        seed: Fixes everything that is drawn.
        simple: Every name and value is one word of two syllables: what a model that cannot copy yet learns it from.
    """

    def __init__(self, facts: Sequence[RealFact], *, split: Split, seed: int, simple: bool = False) -> None:
        if split not in ("train", "test"):
            raise InputError(f"split is {split!r}; pass 'train' or 'test'")
        self._random = random.Random(f"{split}-{seed}")
        self._split: Split = split
        self._simple = simple
        open_facts = [fact for fact in facts if not fact.held_out]
        shared = {text.casefold() for fact in open_facts for text in (fact.name, fact.value)}
        held_names = {fact.name.casefold() for fact in facts if fact.held_out}
        held = held_names | {fact.value.casefold() for fact in facts if fact.held_out} - shared
        self._forbidden = held
        self._real_words = {word for fact in facts for text in (fact.name, fact.value) for word in words(text)}
        # Digits are matched as parts of numbers, so numbers and web codes are checked whole, in `_allowed`.
        phrases = sorted((text for text in held if not re.search(r"\d|^\.", text)), key=len, reverse=True)
        self._held_phrase = re.compile("|".join(rf"\b{re.escape(text)}\b" for text in phrases)) if phrases else None
        self._chain = _letter_chain([fact.name for fact in open_facts] + [fact.value for fact in open_facts])
        self._pool = self._real_pool([] if simple else open_facts)

    def context(
        self, *, passages: int, facts: tuple[int, int] = (4, 6), questions: int = 12, order: float = 0.7
    ) -> Context:
        """Draw one context.

        Args:
            passages: Number of passages (>= 1).
            facts: Least and greatest number of facts in a passage.
            questions: At most so many questions about facts.
            order: Probability of a question about the first document, and of one about the last.

        Raises:
            InputError: `passages` is less than 1.
        """
        if passages < 1:
            raise InputError(f"passages is {passages}; a context needs at least one")
        rng = self._random
        names = self._names(passages)
        described = [(name, self._facts(name, names, rng.randint(*facts))) for name in names]
        asked = [(name, kind, value) for name, values in described for kind, value in values.items()]
        rng.shuffle(asked)
        found = [
            QuestionAnswer(forms.question(kind, name, rng.randrange(2)), value, kind)
            for name, kind, value in asked[:questions]
        ]
        for which, name in (("first", names[0]), ("last", names[-1])):
            if rng.random() < order:
                found.append(QuestionAnswer(forms.ORDER_QUESTIONS[which], name, which))
        texts = tuple((name, self._text(name, values)) for name, values in described)
        return Context(passages=texts, questions=tuple(found))

    def _text(self, name: str, values: Mapping[str, str]) -> str:
        return " ".join(forms.sentence(kind, name, value, self._random.randrange(3)) for kind, value in values.items())

    def _names(self, count: int) -> list[str]:
        """Draw distinct names; one in four looks like an earlier one, so that the whole name has to be read."""
        rng, names = self._random, [self._place()]
        while len(names) < count:
            name = self._place()
            if rng.random() < 0.25 and not self._simple:
                base = max(re.sub(_GENERIC, " ", rng.choice(names)).split(), key=len)
                name = rng.choice(("North {}", "South {}", "New {}", "{} Islands", "Saint {}", "{}ia")).format(base)
            if name not in names and self._allowed(name):
                names.append(name)
        return names

    def _facts(self, name: str, names: Sequence[str], count: int) -> dict[str, str]:
        values: dict[str, str] = {}
        for kind in self._random.sample(forms.KINDS, count):
            value = self._value(kind, names)
            while value == name or not self._allowed(value):
                value = self._value(kind, names)
            values[kind] = value
        return values

    def _value(self, kind: str, names: Sequence[str]) -> str:
        rng = self._random
        if kind == "population":
            return round_number(10 ** rng.uniform(3, 9.3))
        if kind == "area":
            return round_number(10 ** rng.uniform(0.3, 7.2)) + " sq km"
        if kind == "internet":
            return self._code()
        if kind == "neighbor" and len(names) > 1 and rng.random() < 0.2:
            return rng.choice(names)
        if self._pool[kind] and rng.random() < (0.5 if kind in ("region", "currency") else 0.3):
            return rng.choice(self._pool[kind])
        if kind == "currency":
            return self._currency()
        shapes = {"capital": _CITIES, "region": _REGIONS, "language": _LANGUAGES, "peak": _PEAKS}
        return self._place() if kind == "neighbor" else self._shaped(shapes[kind])

    def _code(self) -> str:
        return "." + "".join(self._random.choices("abcdefghijklmnopqrstuvwxyz", k=2))

    def _currency(self) -> str:
        rng = self._random
        unit = rng.choice(_UNITS) if rng.random() < 0.6 else self._word().lower()
        return rng.choice(("{1}", "{0} {1}", "{0}ian {1}", "{0} {2} {1}")).format(self._word(), unit, self._word())

    def _place(self) -> str:
        while True:
            real = self._pool["name"]
            if real and self._random.random() < 0.15:
                return self._random.choice(real)
            name = self._shaped(_PLACES)
            if self._allowed(name):
                return name

    def _shaped(self, shapes: Sequence[str]) -> str:
        if self._simple:
            return self._word()
        return self._random.choice(shapes).format(self._word(), self._word())

    def _allowed(self, text: str) -> bool:
        lowered = text.casefold()
        return lowered not in self._forbidden and not (self._held_phrase and self._held_phrase.search(lowered))

    def _word(self) -> str:
        """Invent a capitalized word of this split that no real name or value contains."""
        rng = self._random
        while True:
            style = rng.random()
            if self._simple:
                word = rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES)
            elif style < 0.45:
                word = "".join(
                    rng.choice(_ONSETS) * (rng.random() < 0.9) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                    for _ in range(rng.choice((1, 2, 2, 2, 3, 3)))
                ) + rng.choice(_ENDINGS)
            elif style < 0.85:
                word = self._chained_word()
            else:
                word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))
            if rng.random() < 0.06 and not self._simple:
                place = rng.randrange(len(word))
                word = word[:place] + rng.choice(_ACCENTS.get(word[place], word[place])) + word[place + 1 :]
            real = word.casefold() in self._real_words or _bare(word) in self._real_words
            if 3 <= len(word) <= 12 and not real and in_split(word, self._split):
                return word.capitalize()

    def _chained_word(self) -> str:
        rng, word, state = self._random, "", "^^"
        while len(word) < 12:
            letter = rng.choice(self._chain.get(state, "$"))
            if letter == "$":
                break
            word, state = word + letter, state[1] + letter
        return word or "a"

    def _real_pool(self, facts: Sequence[RealFact]) -> dict[str, list[str]]:
        pool: dict[str, list[str]] = {kind: [] for kind in (*forms.KINDS, "name")}
        if self._split == "train":
            for fact in facts:
                pool[fact.kind].append(fact.value)
                pool["name"].append(fact.name)
        return {kind: sorted({text for text in texts if self._allowed(text)}) for kind, texts in pool.items()}


def _bare(word: str) -> str:
    """Return the word lower-cased and without accents."""
    return "".join(c for c in unicodedata.normalize("NFD", word.casefold()) if not unicodedata.combining(c))


def _letter_chain(texts: Sequence[str]) -> dict[str, str]:
    """Return a second-order letter chain over the capitalized words of `texts`: two letters to their successors."""
    chain: dict[str, list[str]] = {}
    for word in sorted({word for text in texts for word in words(text) if len(word) > 3}):
        padded = f"^^{word}$"
        for place in range(len(word) + 1):
            chain.setdefault(padded[place : place + 2], []).append(padded[place + 2])
    return {state: "".join(successors) for state, successors in chain.items()}
