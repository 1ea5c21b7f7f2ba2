"""Reading: files, folders and ready-made objects become `Document`s, lazily and one failure at a time.

Plain text and the record files of the retrieval field (DPR, Contriever, BEIR) are read here, because a corpus of
21 million passages must stream and one bad line must cost one line. Every other type of file is left to the readers
of llama-index-core: extracting text from office formats is a trade of its own. What none of them can read is a
`DocumentFailure` with the next step, never raw bytes passed off as text.

Document ids are relative to the folder the caller named, so a corpus can be moved, and unique over one pass. Nothing
here knows about tokens, passages sizes, models or stores.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from blockrag.errors import DocumentError, InputError
from blockrag.passage import Passage, refuse_lone_surrogates

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

__all__ = ["Document", "DocumentFailure", "DocumentReader", "Source", "read_documents"]

_EMPTY: Mapping[str, object] = MappingProxyType({})

TEXT_SUFFIXES = frozenset({"", ".txt", ".text", ".md", ".markdown", ".rst"})
RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".jsonlines", ".tsv", ".json"})

# A whole file that is one text, and one line of a record file. Both bound what a small .gz can unpack to.
MAX_FILE_BYTES = 1 << 30
MAX_RECORD_BYTES = 64 << 20
# A file that is no record file at all fails on every line; nobody reads a million failures.
MAX_CONSECUTIVE_FAILURES = 100

_MAX_HEADING_CHARACTERS = 200
_ATX_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.+?)(?:[ \t]+#*)?[ \t]*$")
_CODE_FENCE = re.compile(r" {0,3}(?:```|~~~)")
_READER_PACKAGES = "pip install llama-index-readers-file"


@dataclass(frozen=True, slots=True)
class Document:
    """One text with an identity, before it is cut into passages.

    Args:
        id: Unique over the documents of an index; any non-empty string.
        text: The whole text.
        title: Carried into every passage; may be empty.
        metadata: JSON-serializable facts to filter by; never shown to the model.
        passages: The document's passages where the caller already cut it; they are taken as they are, and `text` is
            not split again.

    Raises:
        DocumentError: The id is empty, or a string holds a lone surrogate, which UTF-8 cannot hold.
    """

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, object] = field(default_factory=lambda: _EMPTY)
    passages: tuple[Passage, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            raise DocumentError("a document needs a non-empty id; pass e.g. its relative path or its record id")
        fields = {name: getattr(self, name) for name in ("id", "text", "title")}
        refuse_lone_surrogates(f"document {self.id!r}", fields, DocumentError)


@dataclass(frozen=True, slots=True)
class DocumentFailure:
    """One document, or one source, that could not be used; the others went on.

    Args:
        source: Where it came from, as the caller can find it: a relative path, with the line for record files.
        error: What went wrong and what to do about it.
        document_id: The id the document has, or would have had; None where it cannot be known (a folder that cannot
            be listed, a line that is no record), which is why nothing is pruned after such a failure.
    """

    source: str
    error: Exception
    document_id: str | None = None

    def __str__(self) -> str:
        return f"{self.source}: {self.error}"


class DocumentReader(Protocol):
    """What llama-index readers are here: `load_data(path)` gives objects with a `text`."""

    def load_data(self, file: Path) -> list[Any]:
        """The file's documents, in order."""
        ...


OnFailure: TypeAlias = Callable[[DocumentFailure], None]
# A llama-index node is written as a string, so that annotations never import it.
Source: TypeAlias = "str | Path | Document | Passage | BaseNode"


def read_documents(
    sources: Source | Iterable[Source],
    *,
    on_failure: OnFailure,
    readers: Mapping[str, DocumentReader] | None = None,
) -> Iterator[Document]:
    r"""Read documents one after the other; nothing is read before it is asked for.

    A folder is walked recursively in sorted order without hidden files. Types, each also with `.gz` behind it:

    * `.txt`, `.text`, `.md`, `.markdown`, `.rst` and files without a suffix: one document. Its title is the first
      heading (Markdown), or the heading on the first line (plain text), or the file's stem.
    * `.jsonl`, `.ndjson`, `.jsonlines` (one object per line) and `.json` (a list of them): one document per record
      with `text` and, where present, `id` or `_id`, `title`, `section` (joined to the title); other keys become
      metadata. These are the shapes of Contriever and BEIR.
    * `.tsv`: one document per line, columns named by a header (`id`, `text`, `title`) or in DPR's order without one.
    * any other type: the reader given in `readers`, else the one llama-index's `SimpleDirectoryReader` has for it.

    Text is UTF-8 (a byte order mark is dropped), line ends become `\n`, lone surrogates become U+FFFD. A file is the
    document of its path relative to the folder given (or its name, if given itself); a record keeps its own id, or
    is `path#number`. A file reached twice is read once. Passages with the same `document_id` that follow one another
    are one document. A llama-index document keeps its `id_`; left to llama-index, that id is random, and the next
    run takes the document for another one.

    Args:
        sources: Paths, `Document`, `Passage` or llama-index `Document` objects, in any mixture; or one of these.
        on_failure: Called with every document that cannot be used; raising from it stops the reading.
        readers: Reader per suffix (`{".html": reader}`), before those of llama-index.

    Yields:
        Documents with unique ids. Remembers every id and the file it came from: about 200 bytes per document.
    """
    reading = _Reading(on_failure, readers or {})
    for document, source in reading.read(_listed(sources)):
        if reading.is_new(document, source):
            yield document


def _listed(sources: Source | Iterable[Source]) -> Iterable[Source]:
    """The sources as an iterable; one path or object stands for itself, and a string is a path, not letters."""
    if isinstance(sources, (str, Path, Document, Passage)) or _is_llama_node(sources):
        return [sources]
    return sources


class _Reading:
    """One pass over the sources: what was seen, and where failures go."""

    def __init__(self, on_failure: OnFailure, readers: Mapping[str, DocumentReader]) -> None:
        self._on_failure = on_failure
        self._readers = {suffix.lower(): reader for suffix, reader in readers.items()}
        self._files: set[str] = set()
        self._ids: dict[str, str] = {}

    def fail(self, source: str, error: Exception, document_id: str | None = None) -> None:
        self._on_failure(DocumentFailure(_clean(source), error, document_id))

    def is_new(self, document: Document, source: str) -> bool:
        """Note the document's id; False, with a failure that names both sources, if it is taken."""
        first = self._ids.get(document.id)
        if first is None:
            self._ids[document.id] = source
            return True
        error = DocumentError(
            f"document id {document.id!r} is used twice, by {first} and by {source}; the first is kept; rename one"
        )
        # The id itself is in use, so a failure under it must not protect or remove anything.
        self.fail(source, error, document.id)
        return False

    def read(self, sources: Iterable[Source]) -> Iterator[tuple[Document, str]]:
        """Documents with the source each came from, as a failure should name it."""
        pending: list[Passage] = []
        for number, source in enumerate(sources):
            if pending and not (isinstance(source, Passage) and source.document_id == pending[0].document_id):
                yield _from_passages(pending), f"passages before sources[{number}]"
                pending = []
            if isinstance(source, Passage):
                pending.append(source)
            elif isinstance(source, Document):
                yield source, f"sources[{number}]"
            elif isinstance(source, (str, Path)):
                yield from self._read_path(source)
            else:
                yield from self._read_object(source, f"sources[{number}]")
        if pending:
            yield _from_passages(pending), "the last passages in sources"

    def _read_object(self, node: object, source: str) -> Iterator[tuple[Document, str]]:
        if not _is_llama_node(node):
            wanted = "a path, a Document, a Passage or a llama-index Document"
            self.fail(source, InputError(f"{source} is a {type(node).__name__}; pass {wanted}"))
            return
        try:
            yield _from_llama_node(node), source
        except DocumentError as error:
            self.fail(source, error)

    def _read_path(self, source: str | Path) -> Iterator[tuple[Document, str]]:
        path = Path(source)
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            self.fail(str(source), DocumentError(f"no readable file or folder {str(source)!r} ({_reason(error)})"))
            return
        if stat.S_ISDIR(mode):
            yield from self._read_folder(path)
        elif stat.S_ISREG(mode):
            yield from self._read_file(path, _clean(path.name))
        else:
            self.fail(str(source), DocumentError(f"{str(source)!r} is neither a regular file nor a folder"))

    def _read_folder(self, folder: Path) -> Iterator[tuple[Document, str]]:
        """Depth first in sorted order, with a stack of our own: folders nest deeper than Python recurses."""
        stack = [folder]
        while stack:
            path = stack.pop()
            name = _clean(path.relative_to(folder).as_posix())
            if path == folder or (path.is_dir() and not path.is_symlink()):
                try:
                    children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
                except OSError as error:
                    self.fail(name, DocumentError(f"cannot list the folder {name!r} ({_reason(error)})"))
                    continue
                stack.extend(reversed(children))
            elif path.is_file():
                yield from self._read_file(path, name)
            else:
                # A link to a folder may lead round in circles or out of the corpus.
                problem = "is a link to a folder" if path.is_dir() else "is no regular file, or a broken link"
                self.fail(name, DocumentError(f"{name!r} {problem}; pass what it stands for as a source"), name)

    def _read_file(self, path: Path, name: str) -> Iterator[tuple[Document, str]]:
        real = os.path.realpath(path)
        if real in self._files:
            return
        self._files.add(real)
        suffix, packed = _suffix(path)
        if suffix in RECORD_SUFFIXES and suffix not in self._readers:
            yield from self._read_records(path, name, suffix, packed)
            return
        try:
            document = self._read_whole(path, name, suffix, packed)
        except DocumentError as error:
            self.fail(name, error, name)
            return
        yield document, name

    def _read_whole(self, path: Path, name: str, suffix: str, packed: bool) -> Document:
        """A file that is one document, by its reader or as plain text."""
        stem = _clean(path.name.removesuffix(".gz") if packed else path.name)
        title = stem.removesuffix(Path(stem).suffix)
        if suffix in self._readers or suffix not in TEXT_SUFFIXES:
            if packed:
                raise DocumentError(f"{name!r}: a packed {suffix!r} file cannot be read; unpack it with gunzip")
            text = _extract(path, name, self._readers.get(suffix) or _installed_reader(suffix, name))
            return Document(id=name, text=text, title=title)
        text = _decode(_read_bytes(path, name, packed), name)
        heading = _first_heading(text, first_line_only=suffix not in {".md", ".markdown"})
        return Document(id=name, text=text, title=heading or title)

    def _read_records(self, path: Path, name: str, suffix: str, packed: bool) -> Iterator[tuple[Document, str]]:
        """A file of records: each bad one is a failure of its own, a file of nothing else is given up."""
        bad = 0
        try:
            for number, parse in _rows(path, name, suffix, packed):
                try:
                    document = _from_record(parse(), f"{name}#{number}")
                except DocumentError as error:
                    self.fail(f"{name}:{number}", error)
                    bad += 1
                    if bad == MAX_CONSECUTIVE_FAILURES:
                        raise DocumentError(
                            f"{name!r}: gave up after {bad} bad records in a row; every record needs a 'text'"
                        ) from error
                else:
                    bad = 0
                    yield document, f"{name}:{number}"
        except DocumentError as error:
            self.fail(name, error)


def _suffix(path: Path) -> tuple[str, bool]:
    """The lower-case suffix that says the type, and whether the file is gzip-packed around it."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), True) if suffix == ".gz" else (suffix, False)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _clean(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD, as a decoder would."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_bytes(path: Path, name: str, packed: bool) -> bytes:
    try:
        with _open(path, packed) as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DocumentError(f"cannot read {name!r} ({_reason(error)}); check the file and pass it again") from error
    if len(data) > MAX_FILE_BYTES:
        raise DocumentError(f"{name!r} holds more than {MAX_FILE_BYTES} bytes; split it into several files")
    return data


def _open(path: Path, packed: bool) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if packed else path.open("rb")


def _decode(data: bytes, name: str) -> str:
    """UTF-8 without byte order mark, carriage returns and NUL bytes; anything else is no text."""
    if (place := data.find(0)) >= 0:
        raise DocumentError(
            f"{name!r} is binary or UTF-16 (NUL byte at {place}); convert it to UTF-8 text, or install a reader for it"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name!r} is not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); convert it, e.g. with "
            "iconv -f LATIN1 -t UTF-8"
        ) from None
    return _unify_line_ends(text)


def _unify_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _first_heading(text: str, *, first_line_only: bool) -> str:
    """The first Markdown heading outside code, or nothing; cut where it is too long to be a heading."""
    fenced = False
    for line in io.StringIO(text):
        if _CODE_FENCE.match(line):
            fenced = not fenced
        elif not fenced and (match := _ATX_HEADING.match(line.rstrip("\n"))):
            return match[1].strip()[:_MAX_HEADING_CHARACTERS]
        if first_line_only and not line.isspace():
            return ""
    return ""


# --- records ---------------------------------------------------------------------------------------------------


def _rows(path: Path, name: str, suffix: str, packed: bool) -> Iterator[tuple[int, Callable[[], object]]]:
    """Numbered records, from 1, not yet parsed, so that a bad one raises alone."""
    if suffix == ".json":
        value = _parse_json(_read_bytes(path, name, packed), name)
        for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
            yield number, partial(_itself, record)
        return
    columns: list[str] | None = None
    for number, line in _lines(path, name, packed):
        where = f"{name}:{number}"
        if suffix != ".tsv":
            yield number, partial(_parse_json, line, where)
        elif columns is None and (header := _header(line)):
            columns = header
        else:
            columns = columns or ["id", "text", "title"]
            yield number, partial(_parse_tsv, line, where, columns)


def _itself(record: object) -> object:
    return record


def _lines(path: Path, name: str, packed: bool) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file that are not blank, without a byte order mark."""
    try:
        with _open(path, packed) as stream:
            number = 0
            while line := stream.readline(MAX_RECORD_BYTES + 1):
                number += 1
                if len(line) > MAX_RECORD_BYTES:
                    raise DocumentError(f"{name}:{number}: a record of more than {MAX_RECORD_BYTES} bytes; split it")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DocumentError(f"cannot read {name!r} ({_reason(error)}); check the file and pass it again") from error


def _parse_json(data: bytes, where: str) -> object:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(_decode(data, where), parse_constant=refuse)
    except DocumentError:
        raise
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: not valid JSON ({error}); write one object with a 'text' per record") from None


def _header(line: bytes) -> list[str] | None:
    """Column names, if the line has them: it names a text column, as no passage does."""
    try:
        names = [name.strip().lower() for name in _decode(line, "header").strip("\n").split("\t")]
    except DocumentError:
        return None
    return names if "text" in names and len(set(names)) == len(names) else None


def _parse_tsv(line: bytes, where: str, columns: list[str]) -> dict[str, str]:
    """One tab-separated line. Quotes count where the whole field is quoted (DPR), else they are text."""
    text = _decode(line, where).strip("\n")
    cells = text.split("\t")
    if '"' in text:
        try:
            cells = next(csv.reader([text], delimiter="\t", strict=True))
        except csv.Error:
            cells = text.split("\t")
    if not 2 <= len(cells) <= len(columns):
        raise DocumentError(
            f"{where}: {len(cells)} columns where {len(columns)} are expected ({', '.join(columns)}); "
            "a record is one line, its text without tabs or quoted"
        )
    return dict(zip(columns, cells, strict=False))


def _from_record(record: object, fallback_id: str) -> Document:
    """A document from one record of DPR, Contriever, BEIR or a plain list of titles and texts."""
    if not isinstance(record, dict):
        raise DocumentError(f"{fallback_id}: a {type(record).__name__}, not an object; pass {{'text': ...}} records")
    fields = dict(record)
    keys = [fields.pop(key) for key in ("id", "_id") if key in fields]
    text, title, section = (fields.pop(key, None) for key in ("text", "title", "section"))
    if not isinstance(text, str):
        raise DocumentError(f"{fallback_id}: no string under 'text' (keys: {', '.join(map(str, record))})")
    document_id = next((key for key in keys if key is not None and key != ""), fallback_id)
    if isinstance(document_id, bool) or not isinstance(document_id, (str, int)):
        raise DocumentError(f"{fallback_id}: the id {document_id!r} is neither a string nor a whole number")
    for name, value in (("title", title), ("section", section)):
        if value is not None and not isinstance(value, str):
            raise DocumentError(f"{fallback_id}: {name} is {value!r}, not a string")
    nested = fields.pop("metadata", None)
    metadata = {**fields, **nested} if isinstance(nested, dict) else fields
    return Document(
        id=_clean(str(document_id)),
        text=_unify_line_ends(_clean(text)),
        title=_clean(": ".join(part for part in (title, section) if part)),
        metadata=_clean_metadata(metadata, fallback_id),
    )


def _clean_metadata(metadata: Mapping[Any, object], owner: str) -> Mapping[str, object]:
    """JSON values only, lone surrogates replaced; what JSON does not know becomes its string."""
    if not metadata:
        return _EMPTY
    try:
        text = json.dumps(
            {str(key): value for key, value in metadata.items()}, ensure_ascii=False, allow_nan=False, default=str
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise DocumentError(f"{owner}: its metadata cannot be written as JSON ({error}); pass plain values") from None
    cleaned: dict[str, object] = json.loads(_clean(text))
    return cleaned


# --- other people's objects and files --------------------------------------------------------------------------


def _from_passages(passages: list[Passage]) -> Document:
    first = passages[0]
    text = "\n".join(passage.text for passage in passages)
    return Document(id=first.document_id, text=text, title=first.title, passages=tuple(passages))


def _is_llama_node(value: object) -> bool:
    """Whether the value is a llama-index document or node; without importing llama-index to find out."""
    schema = sys.modules.get("llama_index.core.schema")
    return schema is not None and isinstance(value, schema.BaseNode)


def _from_llama_node(node: Any) -> Document:
    metadata = _clean_metadata(node.metadata, node.node_id)
    title = metadata.get("title")
    return Document(
        id=_clean(node.node_id),
        text=_unify_line_ends(_clean(node.get_content())),
        title=title if isinstance(title, str) else "",
        metadata=metadata,
    )


def _installed_reader(suffix: str, name: str) -> DocumentReader:
    """The reader llama-index has for this suffix.

    Raises:
        DocumentError: The readers are not installed, or there is none for this suffix.
    """
    try:
        installed = importlib.util.find_spec("llama_index.readers.file") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise DocumentError(
            f"{name!r}: a {suffix!r} file needs a reader; {_READER_PACKAGES} covers PDF, Office, CSV and more, or "
            f"pass readers={{{suffix!r}: reader}}, or convert the file to .txt"
        )
    from llama_index.core import SimpleDirectoryReader

    classes = SimpleDirectoryReader.supported_suffix_fn()
    if suffix not in classes:
        raise DocumentError(
            f"{name!r}: llama-index has no default reader for {suffix!r} files; pass readers={{{suffix!r}: reader}}, "
            "or convert the file to .txt"
        )
    reader: DocumentReader = classes[suffix]()
    return reader


def _extract(path: Path, name: str, reader: DocumentReader) -> str:
    """A file's text by a llama-index reader; its parts (pages, sheets) are one text, as they are one document."""
    try:
        parts = [part.text for part in reader.load_data(path)]
    # A reader may raise anything, and one broken file must not lose the others.
    except Exception as error:
        raise DocumentError(f"{name!r}: {type(reader).__name__} failed ({_reason(error)})") from error
    text = _clean("\n\n".join(part for part in parts if part))
    if "\x00" in text:
        raise DocumentError(f"{name!r}: {type(reader).__name__} gave binary data, not text; convert the file to .txt")
    return _unify_line_ends(text)
