"""Build the demo corpus and its questions from a file of public-domain country facts.

    python -m blockrag.demo.build_corpus factbook.json.gz --out blockrag/demo

The input is the CIA World Factbook (a work of the United States government, public domain) in the JSON form of
github.com/factbook/factbook.json (CC0): one object per country, sections by name. Only facts are taken over (a
name, a number); every sentence is written by `forms`. A value that cannot be reduced to a few plain words is left
out rather than guessed. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockrag.demo import forms
from blockrag.errors import InputError

__all__ = ["Country", "build", "countries", "main", "round_number"]

SEED = 2409
HELD_OUT = 60
MAX_FACTS = 6
MIN_FACTS = 4

_SKIPPED_FOLDERS = ("world/", "oceans/", "meta/")
# Entries that are not one place, or are described inside another entry.
_SKIPPED_NAMES = {"European Union", "World", "none", ""}
_RENAMED = {
    "DRC": "Democratic Republic of the Congo",
    "Congo": "Republic of the Congo",
    "Bahamas, The": "The Bahamas",
    "Gambia, The": "The Gambia",
    "UK": "United Kingdom",
    "US": "United States",
    "UAE": "United Arab Emirates",
    "The Dominican": "Dominican Republic",
    "Gaza, Gaza Strip": "Gaza Strip",
    "Saint Helena, Ascension, and Tristan da Cunha": "Saint Helena",
    "FSM": "Federated States of Micronesia",
}
_CFA = {
    "XOF": "West African CFA francs",
    "XAF": "Central African CFA francs",
    "XPF": "CFP francs",
    "RMB": "Chinese yuan",
    "MNT": "Mongolian tugriks",
}
_PLAIN = re.compile(r"[^\W\d_][\w'’.\-]*( [\w'’.\-]+){0,3}")
_NUMBER = re.compile(r"([\d,]+(?:\.\d+)?)( million| billion)?")


@dataclass(frozen=True, slots=True)
class Country:
    """One country or territory with the facts that could be cleaned.

    Args:
        id: Stable identifier (the input's own file stem).
        name: Short name.
        facts: Kind of fact (`forms.KINDS`) to value.
    """

    id: str
    name: str
    facts: Mapping[str, str]


def countries(entries: Mapping[str, Mapping[str, Any]]) -> list[Country]:
    """Return every entry that has a name and at least `MIN_FACTS` clean facts, sorted by name.

    Args:
        entries: "region/code.json" to the country's sections.
    """
    found: dict[str, Country] = {}
    for path in sorted(entries):
        if path.startswith(_SKIPPED_FOLDERS):
            continue
        entry = entries[path]
        name = _name(entry)
        facts = {kind: value for kind, value in _facts(entry, name).items() if value and value != name}
        if name and name not in found and len(facts) >= MIN_FACTS:
            found[name] = Country(id=Path(path).stem, name=name, facts=facts)
    return sorted(found.values(), key=lambda country: country.name)


def round_number(number: float) -> str:
    """Return a count with two significant digits, in words ("890 thousand", "8.9 million", "1.4 billion")."""
    number = round(number, 2 - len(str(int(number))))
    for size, word in ((10**9, " billion"), (10**6, " million"), (1000, " thousand"), (1, "")):
        if number >= size:
            return f"{number / size:g}{word}"
    return f"{number:g}"


def build(entries: Mapping[str, Mapping[str, Any]], *, seed: int = SEED) -> tuple[list[Any], list[Any]]:
    """Return the rows of corpus.jsonl and questions.jsonl.

    Args:
        entries: See `countries`.
        seed: Chooses the held-out countries, the order of the facts and the phrasings.

    Raises:
        InputError: The input holds too few usable countries for the held-out set.
    """
    found = countries(entries)
    if len(found) <= HELD_OUT:
        raise InputError(f"only {len(found)} usable countries; pass the complete factbook file")
    rng = random.Random(seed)
    held_out = {country.id for country in rng.sample(found, HELD_OUT)}
    corpus, questions = [], []
    for country in found:
        kinds = [kind for kind in forms.KINDS if kind in country.facts]
        kinds = rng.sample(kinds, min(len(kinds), MAX_FACTS))
        sentences = [forms.sentence(kind, country.name, country.facts[kind], rng.randrange(3)) for kind in kinds]
        corpus.append({"id": country.id, "title": country.name, "text": " ".join(sentences)})
        questions += [
            {
                "question": forms.question(kind, country.name, rng.randrange(2)),
                "answer": country.facts[kind],
                "passage_id": country.id,
                "kind": kind,
                "held_out": country.id in held_out,
            }
            for kind in kinds
        ]
    return corpus, questions


def _text(entry: Mapping[str, Any], *path: str) -> str:
    """Follow `path` through nested objects; return plain text without markup and notes, "" if absent."""
    node: Any = entry
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping):
        node = node.get("text")
    if not isinstance(node, str):
        return ""
    text = html.unescape(re.sub(r"<[^>]+>", " ", node)).replace("\xa0", " ")
    previous = None
    while previous != text:  # nested parentheses
        previous, text = text, re.sub(r"\([^()]*\)", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _plain(value: str) -> str:
    """Return `value` if it is one to four plain words, else ""."""
    value = re.split(r" (?:on|in|at) ", re.sub(r"\s+", " ", value))[0].strip(" ,;.-")
    return value if 2 < len(value) <= 32 and _PLAIN.fullmatch(value) else ""


def _name(entry: Mapping[str, Any]) -> str:
    for form in ("conventional short form", "conventional long form"):
        name = _text(entry, "Government", "Country name", form)
        name = _RENAMED.get(name, name)
        if (
            name.lower() not in _SKIPPED_NAMES
            and name not in _SKIPPED_NAMES
            and re.fullmatch(r"[^\W\d][^\d;()]*", name)
        ):
            return name
    return ""


def _facts(entry: Mapping[str, Any], name: str) -> dict[str, str]:
    capital = re.split(r"[;,]", _text(entry, "Government", "Capital", "name"))[0]
    return {
        "capital": "" if capital.startswith(("none", "no ", "time", "admin")) else _plain(capital),
        "region": _region(_text(entry, "Geography", "Location")),
        "population": _number(_text(entry, "People and Society", "Population", "total"), "", least=1000),
        "area": _number(
            _text(entry, "Geography", "Area", "total ") or _text(entry, "Geography", "Area", "total"), " sq km"
        ),
        "language": _language(entry),
        "currency": _currency(entry),
        "peak": _peak(_text(entry, "Geography", "Elevation", "highest point")),
        "internet": _code(_text(entry, "Communications", "Internet country code")),
        "neighbor": _neighbor(_text(entry, "Geography", "Land boundaries", "border countries")),
    }


def _region(location: str) -> str:
    region = _plain(location.split(",")[0])
    if region in ("Caribbean", "Middle East"):
        return f"the {region}"
    words = set(region.lower().split())
    return region if words & {"asia", "africa", "europe", "america", "oceania"} and region[0].isupper() else ""


def _number(text: str, unit: str, *, least: float = 1) -> str:
    match = _NUMBER.match(text)
    if not match:
        return ""
    number = float(match[1].replace(",", "")) * {None: 1, " million": 1e6, " billion": 1e9}[match[2]]
    return round_number(number) + unit if number >= least else ""


def _language(entry: Mapping[str, Any]) -> str:
    """Return the first language that is called official, or else the first one named."""
    node = entry.get("People and Society", {}).get("Languages", {})
    raw = node.get("Languages", node.get("text", ""))
    listed = re.split(r"[,;]", raw if isinstance(raw, str) else raw.get("text", ""))
    official = [item for item in listed if "(official" in item]
    text = _text({"text": re.sub(r"\(.*", "", (official or listed)[0])})
    first = _plain(re.sub(r"[\d.]+%|<|less than|\bonly\b", "", text))
    bad = {"languages", "other", "many", "local", "dialect", "spoken", "or", "and", "in", "of"}
    return "" if set(first.lower().split()) & bad or first[:1].islower() else first


def _currency(entry: Mapping[str, Any]) -> str:
    node = entry.get("Economy", {}).get("Exchange rates", {})
    raw = (
        (node.get("Currency") or {}).get("text", "")
        if isinstance(node.get("Currency"), Mapping)
        else node.get("text", "")
    )
    if "US dollar is used" in raw:
        return "US dollars"
    code = re.search(r"\(([A-Z]{3})\)", raw)
    if code and code[1] in _CFA:
        return _CFA[code[1]]
    name = _text({"text": raw}).split(" per ")
    return _plain(name[0]) if len(name) > 1 and "/" not in name[0] and len(name[0].split()) <= 4 else ""


def _peak(text: str) -> str:
    match = re.match(r"([^\d,;]+?) ?-?[\d,.]+ ?m?\b", text)
    return (
        _plain(match[1])
        if match and len(match[1].split()) <= 4 and match[1][0].isupper() and not match[1].endswith("range")
        else ""
    )


def _code(text: str) -> str:
    match = re.fullmatch(r"\.[a-z]{2}", text.split(";")[0].split(",")[0].strip())
    return match[0] if match else ""


def _neighbor(text: str) -> str:
    """Return the neighbor with the longest border: the one a reader would name first."""
    borders = re.findall(r"([^;\d]+?) ([\d,.]+) km", text)
    if not borders:
        return ""
    name = max(borders, key=lambda border: float(border[1].replace(",", "").rstrip(".") or 0))[0].strip()
    return _plain(_RENAMED.get(name, name))


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write corpus.jsonl and questions.jsonl into the folder given by `--out`."""
    parser = argparse.ArgumentParser(description="Build the demo corpus from the World Factbook's facts.")
    parser.add_argument("facts", type=Path, help="factbook.json.gz: region/code.json to country object")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args(argv)
    entries = json.loads(gzip.decompress(arguments.facts.read_bytes()))
    corpus, questions = build(entries)
    _write(arguments.out / "corpus.jsonl", corpus)
    _write(arguments.out / "questions.jsonl", questions)


if __name__ == "__main__":
    main()
