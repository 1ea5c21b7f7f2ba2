"""Fine-tune a model for block attention, and use it: files in, a directory out.

    python examples/finetune.py

A few steps on made-up countries, which the demo model knows how to read already; with your model and your files it is
the same call. docs/guide/fine-tuning.md has the commands for large models and several GPUs.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from blockrag import BlockRAG, Passage
from blockrag.finetune.data.lines import Candidate, Question, RagLine, write_lines
from blockrag.finetune.run import finetune
from blockrag.finetune.settings import PRESETS

CAPITALS = {"Arvo": "Tellin", "Brask": "Onder", "Cend": "Umbra"}


def main() -> None:
    """Train on three countries, save, and ask the saved model about one."""
    passages = [
        Passage(id=name, title=name, text=f"The capital of {name} is {city}.") for name, city in CAPITALS.items()
    ]
    # Questions about the same passages share one line: they are trained together for the price of one.
    line = RagLine(
        passages=tuple(Candidate(passage) for passage in passages),
        questions=tuple(Question(f"What is the capital of {name}?", (city,)) for name, city in CAPITALS.items()),
    )
    _, paper = PRESETS["paper"]
    settings = replace(paper, steps=3, accumulate=1, warmup=0, log_steps=1)
    with tempfile.TemporaryDirectory() as directory:
        data, out = Path(directory) / "train.jsonl", Path(directory) / "tuned"
        write_lines(data, [line])
        done = finetune("demo", [data], out, settings, eval_data=[data], device="cpu", progress=print)
        print(f"{done.steps} steps, {done.path.name} holds {', '.join(sorted(path.name for path in out.iterdir()))}")

        rag = BlockRAG.from_pretrained(str(out))
        rag.ingest(passages)
        answer = rag.query("What is the capital of Brask?")
        print(f"{answer.text} ({answer.usage.tokens_reused} tokens reused)")
        rag.close()


if __name__ == "__main__":
    main()
