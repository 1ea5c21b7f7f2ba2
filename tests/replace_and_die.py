"""Run by test_passage_store.py in a process of its own, which ends like a power cut in the middle of a replacement.

Usage: replace_and_die.py DIRECTORY: within `replacing`, deletes document "d" and dies before its new version is added.
"""

import os
import signal
import sys

from blockrag.ingest import PassageStore

store = PassageStore(sys.argv[1])
with store.replacing():
    store.delete_document("d")
    os.kill(os.getpid(), signal.SIGKILL)
