"""Evaluation: the same questions in three modes, with paired standard errors.

Writes questions about countries the demo model never saw, and one per line about the order of the passages, answers
them in full attention, in block attention, and with passages left at their own positions, and prints the tables. On
the command line, where answers are kept and a second run finds them: blockrag eval MODEL --data FILE --output DIR
Run:  python examples/evaluate_rag.py [MODEL]
"""

import random
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from blockrag import BlockModel
from blockrag.demo import load_corpus, load_questions
from blockrag.evaluation.accuracy import summarize
from blockrag.evaluation.accuracy_report import markdown
from blockrag.evaluation.answers import AnswerSettings, answer_questions, modes_named
from blockrag.evaluation.questions import read_questions
from blockrag.finetune.data.lines import Candidate, Question, RagLine, write_lines

LINES, PASSAGES = 10, 4

# A line: passages, and questions about them. Files of the known data sets: blockrag data read --help
rng = random.Random(0)
corpus = {passage.id: passage for passage in load_corpus()}
lines = []
for country, facts in groupby(load_questions(held_out=True), key=lambda fact: fact.passage_id):
    others = rng.sample([passage for passage in corpus.values() if passage.id != country], PASSAGES - 1)
    passages = rng.sample([corpus[country], *others], PASSAGES)
    questions = [Question(fact.question, (fact.answer,), kind="fact") for fact in list(facts)[:3]]
    order = Question("Which of the documents comes first?", (passages[0].title,), kind="order")
    candidates = tuple(Candidate(passage, supports=passage.id == country) for passage in passages)
    lines.append(RagLine(candidates, (*questions, order)))

model = BlockModel.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "demo")
with tempfile.TemporaryDirectory() as folder:
    write_lines(Path(folder) / "countries.jsonl", lines[:LINES])
    files = answer_questions(
        model,
        read_questions(Path(folder) / "countries.jsonl"),
        modes_named(["full", "block", "block-no-reencode"]),
        AnswerSettings(max_new_tokens=16),
        Path(folder) / "answers",
    )
    result = summarize(files)

print(markdown(result))
for row in result["rows"]:
    order = row["groups"]["order"]["scores"]["substr_em"]
    print(f"{row['mode']}: {100 * order['value']:.0f} % of the questions about the order of passages")
