"""Names and texts that have led other programs out of their directory or out of their format; and a guarded sandbox.

Run by `fresh`: the audit hook that watches every file that is opened for writing cannot be taken off again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from index_fuzz_worker import Watch
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import llama3_tokenizer

from blockrag.encoders import LexicalEncoder
from blockrag.errors import BlockRAGError
from blockrag.fingerprint import block_key
from blockrag.index import PassageIndex
from blockrag.ingest import Document
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.passage import Passage
from blockrag.rag import BlockRAG
from blockrag.stores import DiskStore

__all__ = ["NAMES", "ingest_hostile", "use_namespaces"]

_PATHS = (
    "..", ".", "../../etc/passwd", "/etc/passwd", "/", "//", "a/../../b", "....//....//x", "..\\..\\windows\\win.ini",
    "C:\\Windows\\x", "C:x", "\\\\server\\share\\x", "//server/share/x", "\\\\?\\C:\\x", "file:///etc/passwd",
    "%2e%2e%2f%2e%2e%2fx", "%252e%252e%252fx", "%00", "%c0%ae%c0%ae/x", "~", "~root/x", "$HOME/x", "${HOME}", "%TEMP%",
    "-rf", "--help", "|id", ";id", "`id`", "$(id)", "&& id", "> x", "*", "?", "[a-z]", "{a,b}", "CON", "NUL", "aux.txt",
    "COM1", "LPT1.txt", "x.", "x ", " x", "x::$DATA", "cache.db", "cache.db-wal", "blockrag-store-v1", "vectors.faiss",
    "passages.sqlite3", "ab/0123456789abcdef0123456789abcd.val", ".git/config", "kv", "index", "kv/../../x",
)  # fmt: skip
_CHARACTERS = (
    "\0", "\0/etc/passwd", "a\0b", "\n", "a\nb", "\r\n", "\t", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u202e" "fdp.exe",
    "\u200b", "\u200d", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff", "\ud800", "\udfff", "a\udc80b", "e\u0301", "\u00e9",
    "\u212b", "\u0430dmin", "\u0627\u0644", "\u05d0", "\U0001f468\u200d\U0001f469", "a" + "\u0301" * 300, "x" * 4096,
    "x/" * 2048, "../" * 1365, "\u4e00" * 2048, "'", "\"", "\\", "'; DROP TABLE passage; --", "\" OR 1=1", "%s%s%n",
    "{0}", "{{x}}", "${jndi:ldap://x}", "<script>", "<!--", "]]>", "\\u0000", "\\x00", "null", "None", "true", "0",
    "-0", "1e999", "NaN", "0x10", "[]", "{}", "superseded",
)  # fmt: skip
_MARKUP = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>system<|end_header_id|>",
    "<|im_start|>system", "<|im_end|>", "<s>", "</s>", "<pad>", "<bos>", "<eos>", "[INST]", "[/INST]", "<<SYS>>",
    "<start_of_turn>user", "<end_of_turn>", "<think>", "</think>", "<|endoftext|>", "[BLOCK]", "[Block-Attention]",
    "<|finetune_right_pad_id|>", "- Title:", "Question:", "Answer:",
)  # fmt: skip
_ALONE = (*_PATHS, *_CHARACTERS, *_MARKUP)
NAMES = tuple(
    dict.fromkeys(
        [
            *_ALONE,
            *(f"docs/{name}" for name in _ALONE),
            *(f"{name}/x.txt" for name in _ALONE),
            *(f"The river {name} runs to the sea." for name in _ALONE),
        ]
    )
)
"""Ids, namespaces and texts alike."""


class Guard:
    """A directory in which one subdirectory may change, and a record of what was written elsewhere, or run."""

    def __init__(self, sandbox: Path) -> None:
        self.inside = sandbox / "real"
        self._watch = Watch()
        self._sandbox = sandbox
        for name in ("real", "cwd", "home", "kv", "index", "etc"):
            (sandbox / name).mkdir(parents=True)
        (sandbox / "secret.txt").write_text("secret")
        (sandbox / "rag").symlink_to(sandbox / "real", target_is_directory=True)
        os.chdir(sandbox / "cwd")
        self._before: dict[str, str] = {}
        sys.addaudithook(self._watch)

    def begin(self) -> None:
        """From here on nothing else may change: what is imported and compiled late, and cached at home, is there."""
        os.environ["HOME"] = str(self._sandbox / "home")
        self._before = self._snapshot()

    def changed(self) -> list[str]:
        """What is different outside of the subdirectory, by name."""
        after = self._snapshot()
        return sorted(name for name in self._before.keys() | after if self._before.get(name) != after.get(name))

    def _snapshot(self) -> dict[str, str]:
        found = {}
        for path in self._sandbox.rglob("*"):
            if not path.is_relative_to(self.inside):
                content = path.read_bytes() if path.is_file() else b""
                found[str(path)] = f"{path.lstat().st_mode} {hashlib.sha256(content).hexdigest()}"
        return found

    @property
    def seen(self) -> list[str]:
        """What was written elsewhere, or run, while this watched."""
        return list(self._watch.seen)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Look at every file that is opened for writing, and at everything that runs code."""
        self._watch.directory = self.inside
        try:
            yield
        finally:
            self._watch.directory = None


def _rag(namespace: str = "") -> BlockRAG:
    """Everything in the subdirectory, reached through the symbolic link."""
    root = Path("../rag")
    tokenizer = llama3_tokenizer()
    shape = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 16_384}
    weights = tiny_model(ModelCase("two layers", "llama", shape))
    facts = BlockAttentionFacts(block_fine_tuned=True)
    model = BlockModel(weights, tokenizer, facts=facts, store=DiskStore(root / "kv"), namespace=namespace)
    return BlockRAG(model, PassageIndex(LexicalEncoder(64), root / "index"))


def _warm_rag() -> BlockRAG:
    """The same after it was used once."""
    rag = _rag()
    rag.ingest([Document("warm", "The river runs.")])
    rag.query("Where?")
    return rag


def ingest_hostile(sandbox: str) -> dict[str, Any]:
    """Documents whose ids, titles and texts are hostile, one of each per name.

    Returns:
        "round trips" and "typed errors" of ids, and of texts; "seen" and "changed": what was run, or written elsewhere;
        and "control": the same for one file that is written elsewhere on purpose.
    """
    guard = Guard(Path(sandbox))
    counts: Counter[str] = Counter()
    with contextlib.closing(_warm_rag()) as rag:
        guard.begin()
        with guard.watch():
            documents = []
            for number, name in enumerate(NAMES):
                with _typed(counts, "ids"):
                    documents.append(Document(name, f"Text {number}.", name[:60]))
                with _typed(counts, "texts"):
                    passage = Passage(f"passage {number}", name, document_id=f"document {number}")
                    documents.append(Document(f"document {number}", name, passages=(passage,)))
            report = rag.ingest(documents)
            assert not report.failures, [f"{failure.source:.40}: {failure.error!s:.200}" for failure in report.failures]
            stored = set(rag.store.keys())
            special = set(rag.model.tokenizer.all_special_ids)
            for document in documents:
                (passage,) = rag.index.passages(document.id)
                assert passage == rag.index.get(passage.id)
                block = rag.model.template.passage_block(rag.model.tokenizer, passage)
                assert rag.model.block_key(block.token_ids) in stored
                assert not special & set(block.token_ids), f"{document.id!r} has special tokens in its block"
                hostile_id = document.id in _KNOWN
                assert passage.document_id == document.id
                assert hostile_id or passage.text == document.text
                counts["ids round trips" if hostile_id else "texts round trips"] += 1
            answer = rag.query(NAMES[0])
            assert answer.usage.blocks_damaged == 0
            for document in documents[::7]:
                rag.delete(document.id)
                assert not list(rag.index.passages(document.id))
    changed = guard.changed()
    seen = guard.seen
    with guard.watch():
        Path("../real/../escaped").write_text("x")
    control = [guard.changed() != changed, guard.seen != seen]
    return {**counts, "seen": seen, "changed": changed, "control": control}


_KNOWN = frozenset(NAMES)


def use_namespaces(sandbox: str) -> dict[str, Any]:
    """One block under every namespace, in one store.

    Returns:
        "round trips" and "typed errors"; "seen" and "changed" as above.
    """
    guard = Guard(Path(sandbox))
    counts: Counter[str] = Counter()
    keys = {}
    with contextlib.closing(_warm_rag()) as rag:
        fingerprint = rag.model.fingerprint.digest
    guard.begin()
    for name in NAMES:
        with _typed(counts, "namespaces"):
            keys[name] = block_key([1, 2, 3], fingerprint=fingerprint, namespace=name)
    assert len(set(keys.values())) == len(keys), "two namespaces share a key"
    with guard.watch(), contextlib.closing(DiskStore("../rag/kv")) as store:
        for number, key in enumerate(keys.values()):
            store.put(key, number.to_bytes(4, "little") * 10_000)
        for number, key in enumerate(keys.values()):
            assert bytes(store.get(key) or b"")[:4] == number.to_bytes(4, "little")
            counts["namespaces round trips"] += 1
        assert store.contains_many(keys.values()) == set(keys.values())
    # Whole passes for some of them: the namespace reaches everything that stores.
    for name in list(keys)[:: len(keys) // 8]:
        with guard.watch(), contextlib.closing(_rag(name)) as rag:
            rag.ingest([Document("d", "The river runs to the sea.")])
            (passage,) = rag.index.passages("d")
            block = rag.model.template.passage_block(rag.model.tokenizer, passage)
            assert rag.store.get(rag.model.block_key(block.token_ids)) is not None
            counts["passes"] += 1
    return {**counts, "seen": guard.seen, "changed": guard.changed()}


@contextlib.contextmanager
def _typed(counts: Counter[str], what: str) -> Iterator[None]:
    try:
        yield
    except BlockRAGError as error:
        assert str(error)  # noqa: PT017 - a message there must be
        counts[f"{what} typed errors"] += 1
