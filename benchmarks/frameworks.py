"""What a framework adds to the first token: the same prompt through each integration and through the bare Python API.

    python benchmarks/frameworks.py [--shape 100m] [--passages 16] [--repeats 15]

Every way answers the same question about the same passages with one token, from warm blocks in memory; a request counts
from the call to the end of that answer, so that what a framework does behind the first token counts as well. Finished
prompts are not kept: every request composes anew. Ways take turns, each beside the bare API with the same prompt, and
what is compared are ratios within a turn. Needs the three integrations and the `server` extra. Writes JSON and a
Markdown table to benchmarks/results/frameworks-<shape>-<device>/ and prints the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blockrag.evaluation.speed.machine import busy_share, busy_warning, commit, describe_machine, versions
from blockrag.evaluation.speed.shapes import Subject, SubjectSpec
from blockrag.evaluation.speed.text import milliseconds, place, table
from blockrag.model.sampling import GenerationOptions
from blockrag.model.shared import register_model
from blockrag.passage import Passage
from blockrag.prompt import Excerpt, Message, SegmentedPrompt, segment_chat, segment_rag

QUESTION = "Which of these rivers reaches the sea first?"
FRAMEWORKS = ("llama-index-core", "langchain-core", "haystack-ai", "fastapi", "openai")
FORMS = ("chat form", "rag form")
ONE_TOKEN = GenerationOptions(max_new_tokens=1, ignore_eos=True)


@dataclass(frozen=True)
class Way:
    """One way to ask.

    Args:
        name: In the table.
        bare: The way of the bare API with the same prompt, on the same thread.
        ask: Runs one request to its end; returns the tokens it reused, where it tells.
    """

    name: str
    bare: str
    ask: Callable[[], int | None]


def main() -> int:
    """Measure, write both files, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="100m", help="a shape of `blockrag bench`, with random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--passage-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    subject = SubjectSpec(shape=arguments.shape, device=arguments.device).load()
    result = measure(subject, arguments)
    # Where the files go is the reader's business.
    kept = [word for word in sys.argv[1:] if word != "--output" and word != str(arguments.output)]
    result["command"] = " ".join(["python benchmarks/frameworks.py", *kept])
    directory = arguments.output / f"frameworks-{arguments.shape}-{subject.device}"
    directory.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    (directory / "frameworks.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (directory / "frameworks.md").write_text(text, "utf-8")
    print(text)
    return 0


def measure(subject: Subject, arguments: argparse.Namespace) -> dict[str, Any]:
    """All ways in turns; a result as the other benchmarks write it."""
    passages = make_passages(arguments.passages, arguments.passage_tokens)
    busy = busy_share()
    with served(subject) as url:
        bare = bare_ways(subject, passages)
        ways = [
            *llama_index_ways(subject, passages),
            *langchain_ways(subject, passages),
            *haystack_ways(subject, passages),
            *server_ways(url, passages),
        ]
        samples: dict[str, list[float]] = {name: [] for name in (*bare, *(way.name for way in ways))}
        ratios: dict[str, list[float]] = {way.name: [] for way in ways}
        reused: dict[str, int | None] = {}
        # Two rounds do not count: the first computes the blocks, the second warms what each framework loads lazily.
        for turn in range(-2, arguments.repeats):
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                beside, _ = timed(bare[way.bare])
                own, reused[way.name] = timed(way.ask)
                if turn >= 0:
                    samples[way.bare].append(beside)
                    samples[way.name].append(own)
                    ratios[way.name].append(own / beside)
    prompts = {name: segmented(subject, name, messages_of(name, passages)) for name in FORMS}
    for way in ways:
        prompt = prompts[way.bare.removesuffix(", async")]
        expected = prompt.num_tokens - len(prompt.blocks[-1])
        if reused[way.name] not in (None, expected):
            raise RuntimeError(f"{way.name} reused {reused[way.name]} tokens where the bare API reuses {expected}")
    return {
        "schema": 1,
        "benchmark": "frameworks",
        **commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": {**versions(), **{name: version(name) for name in FRAMEWORKS}},
        "machine": describe_machine(subject.device),
        "busy": busy,
        "model": subject.describe(),
        "settings": {
            "passages": arguments.passages,
            "prompt_tokens": {name: prompt.num_tokens for name, prompt in prompts.items()},
            "repeats": arguments.repeats,
        },
        "bare": {name: samples[name] for name in bare},
        "ways": [
            {"name": way.name, "bare": way.bare, "seconds": samples[way.name], "ratios": ratios[way.name]}
            for way in ways
        ],
    }


def timed(ask: Callable[[], int | None]) -> tuple[float, int | None]:
    """Seconds of one request, and the tokens it reused."""
    started = time.perf_counter()
    reused = ask()
    return time.perf_counter() - started, reused


# -- the same prompt, however it is asked -----------------------------------------------------------------------------


def make_passages(count: int, tokens: int) -> list[Passage]:
    """Passages of about so many tokens of a byte-level tokenizer, all different."""
    sentence = "The river runs from the lake past the old mill to the sea. "
    text = (sentence * (tokens // len(sentence) + 1))[: max(tokens - 12, 1)].strip()
    return [Passage(id=str(i), title=f"River {i}", text=f"River {i}. {text}") for i in range(count)]


def messages_of(name: str, passages: list[Passage]) -> list[Message]:
    """What the framework's stock prompt says, or the plain question behind its documents."""
    if name == "rag form":
        return [Message("user", (*passages, QUESTION))]
    from llama_index.core.prompts.chat_prompts import CHAT_TEXT_QA_PROMPT

    system, user = CHAT_TEXT_QA_PROMPT.format_messages(context_str="CONTEXT", query_str=QUESTION)
    before, after = str(user.content).split("CONTEXT")
    shown: list[Any] = []
    for passage in passages:
        shown += ["\n\n", Excerpt(passage.text, passage)] if shown else [Excerpt(passage.text, passage)]
    return [Message("system", (str(system.content),)), Message("user", (before, *shown, after))]


def segmented(subject: Subject, name: str, messages: list[Message]) -> SegmentedPrompt:
    """The messages as blocks, in the named form."""
    template, tokenizer = subject.model.template, subject.model.tokenizer
    if name == "rag form":
        return segment_rag(template, tokenizer, messages)
    return segment_chat(template, tokenizer, messages, question=QUESTION)


def bare_ways(subject: Subject, passages: list[Passage]) -> dict[str, Callable[[], int | None]]:
    """The bare API: from messages to the answer."""
    model = subject.model

    def ask(name: str) -> Callable[[], int | None]:
        messages = messages_of(name, passages)
        return lambda: model.generate(segmented(subject, name, messages), ONE_TOKEN).usage.tokens_reused

    def aask(name: str) -> Callable[[], int | None]:
        messages = messages_of(name, passages)

        async def run() -> int:
            return (await model.agenerate(segmented(subject, name, messages), ONE_TOKEN)).usage.tokens_reused

        return lambda: asyncio.run(run())

    ways = {name: ask(name) for name in FORMS}
    return ways | {f"{name}, async": aask(name) for name in FORMS}


# -- the frameworks ---------------------------------------------------------------------------------------------------


def llama_index_ways(subject: Subject, passages: list[Passage]) -> list[Way]:
    """The language model with explicit blocks; stock and own synthesizers, which stream."""
    from llama_index.core import Settings
    from llama_index.core.llms import ChatMessage, TextBlock
    from llama_index.core.response_synthesizers import get_response_synthesizer
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.llms.blockrag import BlockRAGLLM, BlockSynthesizer, PassageBlock

    Settings.tokenizer = lambda text: text.split()
    llm = BlockRAGLLM.from_model(subject.model, max_new_tokens=1)
    hits = [NodeWithScore(node=TextNode(id_=one.id, text=one.text), score=1.0) for one in passages]
    system, user = messages_of("chat form", passages)
    blocks = [
        TextBlock(text=part) if isinstance(part, str) else PassageBlock.from_node(hits[int(part.passage.id)])
        for part in user.parts
        if isinstance(part, (str, Excerpt))
    ]
    asked = [ChatMessage(role="system", content=system.text), ChatMessage(role="user", blocks=blocks)]
    stock = get_response_synthesizer(llm=llm, streaming=True)
    own = BlockSynthesizer(llm=llm, streaming=True)

    def chat() -> int | None:
        (*_, last) = llm.stream_chat(asked)
        return int(last.raw["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def astream() -> int | None:
        last = None
        async for response in await llm.astream_chat(asked):
            last = response
        return None if last is None else int(last.raw["usage"]["prompt_tokens_details"]["cached_tokens"])

    def synthesize(synthesizer: Any) -> Callable[[], None]:
        return lambda: [None for _ in synthesizer.synthesize(QUESTION, hits).response_gen][:0] or None

    return [
        Way("LlamaIndex, `stream_chat`", "chat form", chat),
        Way("LlamaIndex, `astream_chat`", "chat form, async", lambda: asyncio.run(astream())),
        Way("LlamaIndex, stock compact synthesizer, tracked", "chat form", synthesize(stock)),
        Way("LlamaIndex, `BlockSynthesizer`", "chat form", synthesize(own)),
    ]


def langchain_ways(subject: Subject, passages: list[Passage]) -> list[Way]:
    """The chat model, streaming."""
    from langchain_blockrag import ChatBlockRAG, documents_to_blocks
    from langchain_core.documents import Document

    model = ChatBlockRAG.from_model(subject.model, max_tokens=1)
    documents = [Document(id=one.id, page_content=one.text, metadata={"title": one.title}) for one in passages]

    def cached(chunks: list[Any]) -> int:
        total = chunks[0]
        for chunk in chunks[1:]:
            total += chunk
        return int(total.usage_metadata["input_token_details"]["cache_read"])

    async def astream() -> list[Any]:
        return [chunk async for chunk in model.astream([documents_to_blocks(documents, QUESTION)])]

    return [
        Way(
            "LangChain, `stream`",
            "rag form",
            lambda: cached(list(model.stream([documents_to_blocks(documents, QUESTION)]))),
        ),
        Way("LangChain, `astream`", "rag form, async", lambda: cached(asyncio.run(astream()))),
    ]


def haystack_ways(subject: Subject, passages: list[Passage]) -> list[Way]:
    """The generator, alone and in a pipeline."""
    from haystack import Document, Pipeline
    from haystack.dataclasses import ChatMessage
    from haystack_integrations.components.generators.blockrag import BlockRAGChatGenerator

    documents = [Document(id=one.id, content=one.text, meta={"title": one.title}) for one in passages]
    asked = [ChatMessage.from_user(QUESTION)]
    config = register_model(subject.model)
    generators = [
        BlockRAGChatGenerator(config.model, store=config.store, generation_kwargs={"max_tokens": 1}) for _ in "ab"
    ]
    pipeline = Pipeline()
    pipeline.add_component("llm", generators[1])

    def cached(replies: list[Any]) -> int:
        return int(replies[0].meta["usage"]["prompt_tokens_details"]["cached_tokens"])

    return [
        Way("Haystack, generator", "rag form", lambda: cached(generators[0].run(asked, documents)["replies"])),
        Way(
            "Haystack, pipeline",
            "rag form",
            lambda: cached(pipeline.run({"llm": {"messages": asked, "documents": documents}})["llm"]["replies"]),
        ),
    ]


@contextmanager
def served(subject: Subject) -> Iterator[str]:
    """The HTTP server on a free port of the loopback interface."""
    from blockrag.server.app import create_app
    from blockrag.server.run import Server, listen
    from blockrag.server.settings import ServerSettings

    bound = listen("127.0.0.1", 0)
    server = Server(create_app(subject.model, ServerSettings(model_name=subject.name)))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def server_ways(url: str, passages: list[Passage]) -> list[Way]:
    """The OpenAI client, streaming, documents beside the messages."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    documents = [{"id": one.id, "title": one.title, "text": one.text} for one in passages]

    def ask() -> int:
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=1,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"documents": documents},
        )
        (*_, last) = stream
        return int(last.usage.prompt_tokens_details.cached_tokens)

    return [Way("`blockrag serve`, openai client", "rag form, async", ask)]


# -- the report -------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """The table, and how it was measured."""
    rows = []
    for way in result["ways"]:
        ratios, seconds = sorted(way["ratios"]), sorted(way["seconds"])
        added = statistics.median(seconds) - statistics.median(seconds_of_bare(result, way))
        rows.append(
            [
                way["name"],
                way["bare"],
                milliseconds(statistics.median(seconds)),
                f"**{statistics.median(ratios):.2f}x** ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                f"{added * 1000:+.1f}",
            ]
        )
    bare = ", ".join(
        f"{name} {milliseconds(statistics.median(samples))} ms" for name, samples in result["bare"].items()
    )
    prompts = ", ".join(
        f"{tokens:,} tokens in the {name}" for name, tokens in result["settings"]["prompt_tokens"].items()
    )
    header = ["way", "bare API's prompt", "milliseconds", "over the bare API", "milliseconds added"]
    warning = busy_warning(result["busy"])
    listed = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"- `{result['command']}`",
        f"- {result['date']}, commit {(result['commit'] or 'unknown')[:12]}"
        f"{' with local changes' if result['modified'] else ''}; {listed}",
        f"- {place(result)}; {result['model']['name']}, random weights",
    ]
    return (
        "\n\n".join(
            [
                "# What a framework adds to the first token",
                f"One-token answers over {result['settings']['passages']} passages from warm blocks in memory, whole "
                f"requests; medians of {result['settings']['repeats']}, in brackets least and most of the ratios "
                f"within a turn. The bare API, from messages to the answer: {bare}. Prompts: {prompts}. What runs on "
                "the model's worker thread is compared with the bare API's asynchronous calls, which do the same.",
                *([f"**Warning: {warning}**"] if warning else []),
                table(header, rows),
                "## How it was measured",
                "\n".join(lines),
            ]
        )
        + "\n"
    )


def seconds_of_bare(result: dict[str, Any], way: dict[str, Any]) -> list[float]:
    """What the bare API took in the turns of this way."""
    return [own / ratio for own, ratio in zip(way["seconds"], way["ratios"], strict=True)]


if __name__ == "__main__":
    sys.exit(main())
