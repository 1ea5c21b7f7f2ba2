"""Run by test_index_fuzz.py in a process of its own: opens one damaged directory after another and tells what happened.

Reads JSON lines (`{"directory": ..., "kind": "flat"}`), answers each with one:

    calls       for every call "ok", or the class of the error that blockrag raised
    answers     what the searches found, as far as they ended
    defects     exceptions that are not blockrag's
    executions  what the audit hook saw that reading data must not do
    peak_kib    the most memory this process ever had

The first line is a warm-up: what is imported and compiled until it is answered does not count. `{"misbehave": how}` has
the process do what must be noticed.
"""

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

from process_memory import resident

from blockrag.cli.directory import find_settings
from blockrag.encoders import LexicalEncoder
from blockrag.errors import BlockRAGError, InputError, PassageIndexError
from blockrag.index import PassageIndex
from blockrag.index.checking import check_index
from blockrag.passage import Passage

QUESTIONS = ["text number 3", "what is green?", "7"]
# Reading data runs no code, starts nothing, and talks to nobody.
FORBIDDEN = (
    "compile",
    "ctypes.dlopen",
    "exec",
    "import",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "sqlite3.enable_load_extension",
    "sqlite3.load_extension",
    "subprocess.Popen",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate")


class Watch:
    """The audit hook: keeps what is forbidden, and changes of files outside the directory at hand."""

    def __init__(self):
        self.directory = None
        self.seen = []

    def __call__(self, event, arguments):
        if self.directory is None:
            return
        if event in FORBIDDEN or (self._changes(event, arguments) and self._outside(arguments[0])):
            self.seen.append(f"{event} {arguments!r:.100}")

    @staticmethod
    def _changes(event, arguments):
        return event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITING)

    def _outside(self, name):
        # A number is a file that was opened by its name, and seen then.
        return not isinstance(name, int) and not Path(os.fsdecode(name)).resolve().is_relative_to(self.directory)


def everything(directory, kind, answers):
    """Every way into an index, as (name, call) pairs."""
    path = Path(directory)
    yield "settings", lambda: find_settings(path)
    yield "peek", lambda: PassageIndex.peek(path)
    yield "check", lambda: check_index(path)
    index = None

    def opened():
        nonlocal index
        index = PassageIndex(LexicalEncoder(64), path, kind=kind)

    yield "open", opened
    if index is None:
        return
    ways = {
        "search": lambda: [[hit.passage.id for hit in hits] for hits in index.search_many(QUESTIONS, 3)],
        "filter": lambda: sorted(hit.passage.id for hit in index.search("text", 50, where={"third": 1})),
        "texts": lambda: [[p.id, p.title, p.text, p.document_id, dict(p.metadata)] for p in index.passages()],
        "documents": lambda: [[d.document_id, d.passages, d.content_hash] for d in index.documents()],
        "keys": lambda: sorted(index.block_keys()),
    }
    for name, way in ways.items():
        yield name, lambda name=name, way=way: answers.__setitem__(name, way())
    yield "add", lambda: index.add([Passage("new", "a text number 3 that is new", document_id="d1")])
    yield "delete", lambda: index.delete_document("d2")
    yield "again", lambda: index.search_many(QUESTIONS, 50)
    yield "fix", lambda: index.verify(fix=True)
    yield "close", index.close


def run(directory, kind):
    """All calls on one directory."""
    calls, answers, defects = {}, {}, []
    for name, call in everything(directory, kind, answers):
        try:
            call()
            calls[name] = "ok"
        except (PassageIndexError, InputError) as error:
            calls[name] = type(error).__name__
            if len(str(error)) > 2000:
                defects.append(f"{name}: a message of {len(str(error))} characters")
        except BlockRAGError as error:
            defects.append(f"{name}: {type(error).__name__}: {error}")
        except Exception:
            defects.append(f"{name}: {traceback.format_exc()}")
    return {"calls": calls, "answers": answers, "defects": defects}


def misbehave(how):
    """Do what must be noticed."""
    if how == "crash":
        os.abort()
    elif how == "hang":
        time.sleep(3600)
    elif how == "execute":
        exec("pass")
    elif how == "write elsewhere":
        Path("/tmp/blockrag-fuzz-control").touch()
        Path("/tmp/blockrag-fuzz-control").unlink()
    elif how == "eat memory":
        b"x" * (400 << 20)
    return {"calls": {}, "answers": {}, "defects": []}


def main():
    """Answer line after line."""
    logging.disable()
    watch = Watch()
    warm = False
    for line in sys.stdin:
        case = json.loads(line)
        if warm:
            watch.directory = Path(case.get("directory", "/nowhere")).resolve()
        answer = misbehave(case["misbehave"]) if "misbehave" in case else run(case["directory"], case["kind"])
        watch.directory = None
        answer["executions"], watch.seen = watch.seen, []
        answer["peak_kib"] = resident("VmHWM") >> 10
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if not warm:
            sys.addaudithook(watch)
            warm = True


if __name__ == "__main__":
    main()
