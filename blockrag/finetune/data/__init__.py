"""Data sets to data files: one format, readers of the published sets, and the steps between them.

    lines.py      the format: lines, what is wrong with them, files
    records.py    published files as records with their places: JSON, JSON lines, parquet
    parts.py      from a record's parts to a line
    multihop.py   2WikiMultihopQA, HotpotQA, MuSiQue
    retrieved.py  NQ and TriviaQA with a retriever's candidates
    squad.py      SQuAD, with several questions to a line
    chat.py       conversations
    sources.py    all of these by name
    ranking.py    a question's passages: ranked anew, or found in a corpus
    mixing.py     drawing, joining, shuffling
    teacher.py    responses written by a model
    checking.py   what a file holds

Import from the modules; nothing here loads torch before it is needed.
"""
