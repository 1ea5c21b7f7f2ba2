"""Documents in, an answer with its sources out, and how much work the stored KV states saved.

Runs offline in seconds with the small demo model. Run:  python examples/01_quickstart.py
"""

from blockrag import BlockRAG, GenerationOptions
from blockrag.demo import load_corpus

options = GenerationOptions(max_new_tokens=24)

with BlockRAG.from_pretrained("demo") as rag:
    report = rag.ingest(load_corpus())
    print(report)

    for question in ("What is the capital of Bhutan?", "What is the currency of Kenya?"):
        answer = rag.query(question, options)
        print(f"\n{question}  ->  {answer.text}")
        for hit in answer.hits:
            print(f"  {hit.score:7.2f}  {hit.passage.title}")
        print(f"  {answer.usage.tokens_reused} tokens reused, {answer.usage.tokens_computed} computed")
        print(f"  first token after {1000 * answer.timings.ttft_s:.0f} ms")

    # The same weights, the same call, without blocks: every passage is prefilled again.
    full = rag.query("What is the capital of Bhutan?", options, attention="full")
    print(f"\nfull attention  ->  {full.text}   ({full.usage.tokens_computed} tokens computed)")
