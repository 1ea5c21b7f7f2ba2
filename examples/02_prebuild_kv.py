"""Build the KV states ahead of time, in one process; answer from them in another.

The index and the blocks live in a directory. Whoever opens it later computes only the question.
Run:  python examples/02_prebuild_kv.py [DIRECTORY]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from blockrag import BlockRAG, GenerationOptions
from blockrag.demo import load_corpus

ASK = """
import sys
from blockrag import BlockRAG, GenerationOptions
with BlockRAG.from_pretrained("demo", path=sys.argv[1]) as rag:
    answer = rag.query(sys.argv[2], GenerationOptions(max_new_tokens=24))
    print(answer.text, "|", answer.usage.tokens_reused, "tokens reused,", answer.usage.tokens_computed, "computed")
"""


def main(directory: Path) -> None:
    """Build in this process, answer in another, delete."""
    with BlockRAG.from_pretrained("demo", path=directory) as rag:
        print("first run: ", rag.ingest(load_corpus()))
        print("second run:", rag.ingest(load_corpus()))
        stats = rag.stats()
        print(f"stored: {stats.index.passages} passages, {stats.store.blocks} blocks, {stats.store.bytes:,} bytes")

    question = "What is the capital of Bhutan?"
    print(f"\nanother process, {question}")
    subprocess.run([sys.executable, "-c", ASK, str(directory), question], check=True)

    with BlockRAG.from_pretrained("demo", path=directory) as rag:
        change = rag.delete(load_corpus()[0].document_id)
        print(f"\ndeleted a document: {change.removed} passage, {len(change.orphaned_block_keys)} block")
        answer = rag.query(question, GenerationOptions(max_new_tokens=24))
        print(f"the others are still there: {answer.text}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
