"""Run by test_ingest.py in a process of its own: passes that are killed at chosen places, and passes that resume them.

Usage: ingest_and_die.py CORPUS STATES PLACE..., with places like "block:5" (when that many blocks were computed),
"commit:2" (right before that commit), "drop:1" (right after that commit, before unused blocks are dropped) or
"never:0". Each place gets a directory of its own in STATES, and two passes: one that dies there, one that goes on.
Prints one line per place: its name, the signal that ended the first pass, and what the second one prefilled.

The libraries take seconds to import, so it is done once, and every pass runs in a fork made before they are used.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import CASES, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.encoders import LexicalEncoder
from blockrag.index import PassageIndex
from blockrag.ingest import ingest
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.stores import open_store


def die():
    """End like a power cut: nothing is flushed, closed or caught."""
    os.kill(os.getpid(), signal.SIGKILL)


class DyingIndex(PassageIndex):
    """A real index whose process dies around a commit."""

    dies = ("never", 0)
    commits = 0

    def replace_documents(self, documents):
        self.commits += 1
        if self.dies == ("commit", self.commits):
            die()
        change = super().replace_documents(documents)
        if self.dies == ("drop", self.commits):
            die()
        return change


class DyingProgress:
    """Dies when so many blocks were computed."""

    def __init__(self, dies):
        self.dies = dies
        self.blocks = 0

    def start(self, total_documents):
        pass

    def advance(self, *, documents=0, passages=0, tokens=0):
        self.blocks += tokens > 0
        if self.dies == ("block", self.blocks):
            die()

    def finish(self):
        pass


def run(corpus, state, dies, output):
    """One pass; writes the tokens it prefilled."""
    store = open_store(f"disk://{state / 'store'}")
    case = next(case for case in CASES if case.id == "llama")
    facts = BlockAttentionFacts(block_fine_tuned=True)
    model = BlockModel(tiny_model(case), plain_tokenizer(), facts=facts, precision="float32", store=store)
    with DyingIndex(LexicalEncoder(64), state / "index") as index:
        index.dies = dies
        report = ingest(
            corpus, index=index, model=model, store=store, progress=DyingProgress(dies), batch_documents=2, prune=True
        )
    store.close()
    os.write(output, str(report.tokens_new).encode())


def forked(corpus, state, dies):
    """One pass in a process of its own; returns the signal that ended it (0 for none) and what it wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            run(corpus, state, dies, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        tokens = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"the pass that dies at {dies} failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, tokens


def main():
    """Kill and resume at every place."""
    corpus, states, *places = sys.argv[1:]
    for place in places:
        where, _, number = place.partition(":")
        state = Path(states) / where
        state.mkdir(parents=True)
        ended, tokens = forked(corpus, state, (where, int(number)))
        _, resumed = forked(corpus, state, ("never", 0))
        sys.stdout.write(f"{where} {ended} {tokens or 0} {resumed}\n")


if __name__ == "__main__":
    main()
