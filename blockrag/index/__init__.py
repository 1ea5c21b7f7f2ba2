"""The passage index: passages in SQLite, vectors in FAISS, kept in step.

`PassageIndex` is all that other layers use. Inside:

- The truth: `schema` (its tables), `connection` (statements and transactions), `opening` (how a file becomes a
  database), `database` (what the tables hold), `digests` (what is kept beside a passage).
- Derived from it: `vectors` and `vector_file` (FAISS, which knows no database), `following` (kept in step with it).
- What is done with both: `writing`, with `updates` and `embedding`; `searching`, with `nearest`; `checking`. Words are
  counted and weighed through `terms`.
"""

from blockrag.index.passage_index import PassageIndex
from blockrag.index.records import Change, DocumentInfo, DocumentUpdate, IndexOrigin, IndexStats

__all__ = ["Change", "DocumentInfo", "DocumentUpdate", "IndexOrigin", "IndexStats", "PassageIndex"]
