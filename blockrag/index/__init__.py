"""The passage index: passages in SQLite, vectors in FAISS, kept in step.

`PassageIndex` is all that other layers use. Inside, `database` is the truth, `vectors` is derived from it, and each
knows nothing of the other.
"""

from blockrag.index.passage_index import PassageIndex
from blockrag.index.records import Change, DocumentInfo, DocumentUpdate, IndexOrigin, IndexStats

__all__ = ["Change", "DocumentInfo", "DocumentUpdate", "IndexOrigin", "IndexStats", "PassageIndex"]
