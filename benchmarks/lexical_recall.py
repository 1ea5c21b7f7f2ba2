"""Recall of the lexical encoder on SQuAD: is the paragraph a question was written for among the first k hits?

    python benchmarks/lexical_recall.py dev-v1.1.json train-v1.1.json.gz

Takes files in SQuAD 1.1 format, plain or gzipped. The corpus is every paragraph of the file, titled with its article.
What is measured beside each other: BM25 itself, computed exactly from word counts, with the corpus's true average
length and with constants in its place; the encoder's vectors alone, which add the noise of the projection; and a
`PassageIndex`, which takes candidates from the vectors and orders them by the encoder's score. Prints a Markdown
table and writes the same figures to benchmarks/results/lexical_recall.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from blockrag.encoders import CorpusCounts, LexicalEncoder
from blockrag.encoders.lexical import words
from blockrag.index import PassageIndex
from blockrag.passage import Passage

RESULTS = Path(__file__).parent / "results" / "lexical_recall.json"
CUTS = (1, 5, 10)
AVERAGE_LENGTHS = (50, 75, 100, 150, 300)
BATCH = 256


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages, and questions with the number of the passage that answers each."""

    name: str
    passages: list[Passage]
    questions: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; recall in percent, times in milliseconds of CPU, so that a busy machine gives them too."""

    corpus: str
    passages: int
    questions: int
    method: str
    recall: dict[str, float]
    add_cpu_ms_per_passage: float | None = None
    search_cpu_ms_per_question: float | None = None


def read_squad(path: Path, *, most_questions: int, seed: int) -> Corpus:
    """A SQuAD file as a corpus; a random sample of its questions when it has more than `most_questions`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    passages: list[Passage] = []
    questions: list[tuple[str, int]] = []
    for article in articles:
        title = article["title"].replace("_", " ")
        for paragraph in article["paragraphs"]:
            questions += [(qa["question"], len(passages)) for qa in paragraph["qas"]]
            passages.append(Passage(id=str(len(passages)), text=paragraph["context"], title=title, document_id=title))
    if len(questions) > most_questions:
        questions = random.Random(seed).sample(questions, most_questions)
    return Corpus(path.name, passages, questions)


def recall(ranks: Sequence[int]) -> dict[str, float]:
    """Percent of questions whose passage is among the first k, for each cut; ranks count from 0."""
    return {f"R@{k}": round(100 * sum(rank < k for rank in ranks) / len(ranks), 1) for k in CUTS}


def bm25_ranks(corpus: Corpus, counts: Sequence[Counter[str]], average: float) -> list[int]:
    """The rank of each question's passage under BM25 (k1 = 1.2, b = 0.75), computed from word counts."""
    postings: dict[str, tuple[list[int], list[float]]] = {}
    for number, counted in enumerate(counts):
        penalty = 1.2 * (0.25 + 0.75 * counted.total() / average)
        for stem, n in counted.items():
            numbers, weights = postings.setdefault(stem, ([], []))
            numbers.append(number)
            weights.append(n * 2.2 / (n + penalty))
    arrays = {stem: (np.array(numbers), np.array(weights)) for stem, (numbers, weights) in postings.items()}
    ranks = []
    for question, answer in corpus.questions:
        scores = np.zeros(len(counts))
        for stem in set(words(question)) & arrays.keys():
            holders, values = arrays[stem]
            scores[holders] += values * math.log(1 + (len(counts) - len(holders) + 0.5) / (len(holders) + 0.5))
        ranks.append(int((scores > scores[answer]).sum()))
    return ranks


def vector_ranks(corpus: Corpus, encoder: LexicalEncoder) -> list[int]:
    """The rank of each question's passage under the inner product of the vectors alone."""
    counts = CorpusCounts(encoder.passage_terms(corpus.passages))
    passages = encoder.encode_passages(corpus.passages)
    ranks: list[int] = []
    for start in range(0, len(corpus.questions), BATCH):
        some = corpus.questions[start : start + BATCH]
        scores = encoder.encode_queries_with([question for question, _ in some], counts) @ passages.T
        answers = scores[np.arange(len(some)), [answer for _, answer in some]]
        ranks += (scores > answers[:, None]).sum(axis=1).tolist()
    return ranks


def index_ranks(corpus: Corpus, index: PassageIndex) -> list[int]:
    """The rank of each question's passage among the hits of an index; 10 when it is not among the first 10."""
    ranks = []
    for start in range(0, len(corpus.questions), BATCH):
        some = corpus.questions[start : start + BATCH]
        for (_, answer), hits in zip(some, index.search_many([q for q, _ in some], max(CUTS)), strict=True):
            found = [hit.passage.id for hit in hits]
            ranks.append(found.index(str(answer)) if str(answer) in found else max(CUTS))
    return ranks


def measure(corpus: Corpus, dimensions: Sequence[int]) -> Iterator[Row]:
    """All rows of one corpus."""
    sizes = (corpus.name, len(corpus.passages), len(corpus.questions))
    counts = [Counter(words(f"{passage.title} {passage.text}")) for passage in corpus.passages]
    mean = sum(counted.total() for counted in counts) / len(counts)
    yield Row(*sizes, f"exact BM25, true average length {mean:.1f}", recall(bm25_ranks(corpus, counts, mean)))
    for average in AVERAGE_LENGTHS:
        yield Row(*sizes, f"exact BM25, average length {average}", recall(bm25_ranks(corpus, counts, average)))
    for dimension in dimensions:
        encoder = LexicalEncoder(dimension)
        yield Row(*sizes, f"{dimension} dimensions, vectors alone", recall(vector_ranks(corpus, encoder)))
        with PassageIndex(encoder) as index:
            start = time.process_time()
            index.add(corpus.passages)
            added = time.process_time()
            ranks = index_ranks(corpus, index)
            adding_s, searching_s = added - start, time.process_time() - added
        add_ms, search_ms = 1000 * adding_s / len(corpus.passages), 1000 * searching_s / len(ranks)
        method = f"{dimension} dimensions, PassageIndex"
        yield Row(*sizes, method, recall(ranks), round(add_ms, 2), round(search_ms, 2))


def markdown(row: Row) -> str:
    """One line of the table."""
    times = [
        f"{ms:.2f}" if ms is not None else "" for ms in (row.add_cpu_ms_per_passage, row.search_cpu_ms_per_question)
    ]
    cells = [row.corpus, f"{row.passages:,}", f"{row.questions:,}", row.method]
    return "| " + " | ".join([*cells, *(f"{row.recall[f'R@{k}']:.1f}" for k in CUTS), *times]) + " |"


def machine() -> dict[str, object]:
    """What the times depend on, without names or paths of the machine."""
    return {
        "cpus": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "faiss-cpu", "snowballstemmer")},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="SQuAD 1.1 file, .json or .json.gz")
    parser.add_argument("--questions", type=int, default=12_000, help="at most this many of each file (sampled)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[1024, 2048])
    arguments = parser.parse_args()
    print(
        "| corpus | passages | questions | method | R@1 | R@5 | R@10 | add, CPU ms/passage | search, CPU ms/question |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    for path in arguments.paths:
        corpus = read_squad(path, most_questions=arguments.questions, seed=arguments.seed)
        for row in measure(corpus, arguments.dimensions):
            print(markdown(row), flush=True)
            rows.append(row)
    names = " ".join(path.name for path in arguments.paths)
    command = (
        f"python benchmarks/lexical_recall.py {names} --questions {arguments.questions} --seed {arguments.seed} "
        f"--dimensions {' '.join(map(str, arguments.dimensions))}"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"command": command, "machine": machine(), "rows": [asdict(row) for row in rows]}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
