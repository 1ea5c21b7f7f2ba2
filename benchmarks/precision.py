"""What each precision at rest changes on the model that ships with blockrag: all the questions of `blockrag demo`.

    python benchmarks/precision.py

Passages are retrieved as `blockrag demo` does it, five per question. Writes JSON and a Markdown table to
benchmarks/results/precision-demo-<device>/ and prints the table; `blockrag.evaluation.drift` measures, with any model.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from blockrag.demo import DemoQuestion, load_corpus, load_questions
from blockrag.evaluation.drift import SMALL_MODEL_WARNING, Drift, measure_drift
from blockrag.evaluation.speed.machine import commit, describe_machine, versions
from blockrag.evaluation.speed.text import place, table
from blockrag.rag import BlockRAG

PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int4")
PASSAGES = 5
MAX_NEW_TOKENS = 24


def main() -> int:
    """Measure, write both files, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, help="ask only the first so many")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    questions = load_questions()[: arguments.questions]
    result = measure(questions)
    result["command"] = " ".join(["python benchmarks/precision.py", *sys.argv[1:]])
    directory = arguments.output / f"precision-demo-{result['machine']['device']}"
    directory.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    (directory / "precision.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (directory / "precision.md").write_text(text, "utf-8")
    print(text)
    return 0


def measure(questions: list[DemoQuestion]) -> dict[str, Any]:
    """Retrieve, answer, compare; a result as the other benchmarks write it."""
    with BlockRAG.from_pretrained("demo", precision="float32", top_k=PASSAGES) as rag:
        model = rag.model
        rag.ingest(load_corpus())
        prompts = [
            model.template.segment(
                model.tokenizer,
                passages=[hit.passage for hit in rag.in_prompt_order(rag.search(asked.question))],
                question=asked.question,
            )
            for asked in questions
        ]
        drift = measure_drift(model, prompts, PRECISIONS, max_new_tokens=MAX_NEW_TOKENS, progress=_tell(len(prompts)))
        device = model.model.device.type
        parameters = sum(parameter.numel() for parameter in model.model.parameters())
    return {
        "schema": 1,
        "benchmark": "precision",
        **commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": describe_machine(device),
        "model": {"name": "demo", "parameters": parameters},
        "settings": {"questions": len(questions), "passages": PASSAGES, "max_new_tokens": MAX_NEW_TOKENS},
        "answer_tokens": drift.answer_tokens,
        "blocks": drift.blocks,
        "block_tokens_mean": drift.block_tokens_mean,
        "right": _right(questions, drift),
        "precisions": [
            {**asdict(one), "unchanged": drift.unchanged(one), "right": _right(questions, drift, one.changed)}
            for one in drift.precisions
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    """The table, what it says and does not say, and how it was measured."""
    asked = result["settings"]["questions"]
    rows = [
        [
            one["precision"],
            f"{one['bytes_per_token']:,.0f}",
            f"{one['bytes_over_float16']:.3f}x",
            f"{asked - len(one['changed']):,} of {asked:,}",
            f"{one['unchanged']:.2%}".replace("%", " %"),
            f"{one['right']:,}",
            f"{one['first_token_kl_mean']:.1e} ({one['first_token_kl_max']:.1e})",
            f"{one['answer_kl_mean']:.1e} ({one['answer_kl_max']:.1e})",
        ]
        for one in result["precisions"]
    ]
    header = [
        *("at rest", "bytes per token", "beside float16", "answers unchanged", "share", "right"),
        *("KL, first token", "KL, whole answer"),
    ]
    versions_ = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        "\n\n".join(
            [
                "# What the precision at rest changes: the demo model",
                f"Greedy answers to {asked:,} questions, compared word for word with those from KV states kept in "
                f"float32; {result['right']:,} of these are right. KL: divergence of the next-token distribution in "
                "nats, mean and largest, at the first token and along the reference answer "
                f"({result['answer_tokens']:,} tokens in all). Bytes are of {result['blocks']:,} blocks of "
                f"{result['block_tokens_mean']:.0f} tokens on average, scales included, headers not.",
                table(header, rows),
                f"**{SMALL_MODEL_WARNING}**",
                "## How it was measured",
                "\n".join(
                    [
                        f"- `{result['command']}`",
                        f"- {result['date']}, commit {(result['commit'] or 'unknown')[:12]}"
                        f"{' with local changes' if result['modified'] else ''}; {versions_}",
                        f"- {place(result)}; {result['model']['parameters']:,} parameters, head size 32; "
                        f"{result['settings']['passages']} passages per question, retrieved by words",
                    ]
                ),
            ]
        )
        + "\n"
    )


def _right(questions: list[DemoQuestion], drift: Drift, changed: tuple[Any, ...] = ()) -> int:
    answers = list(drift.reference)
    for change in changed:
        answers[change.index] = change.answer
    return sum(asked.answer == answer.strip() for asked, answer in zip(questions, answers, strict=True))


def _tell(total: int) -> Any:
    def tell(done: int) -> None:
        if done % 100 == 0 or done == total:
            print(f"{done:,} of {total:,} questions", file=sys.stderr, flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
