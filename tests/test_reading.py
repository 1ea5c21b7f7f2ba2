"""Reading: every shape of file, one failure at a time, ids that can be moved, and nothing that is not text."""

import gzip
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.errors import DocumentError, InputError
from blockrag.ingest import reading
from blockrag.ingest.reading import Document, DocumentFailure, read_documents
from blockrag.passage import Passage


def read(*sources, **options):
    """All documents and all failures of one pass."""
    failures: list[DocumentFailure] = []
    documents = list(read_documents(list(sources), on_failure=failures.append, **options))
    return documents, failures


def write(path: Path, content: str | bytes | list) -> Path:
    """Write text, bytes or a list of records (by the path's suffix), packed where the path says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        if ".jsonl" in path.name:
            content = "".join(json.dumps(record) + "\n" for record in content)
        else:
            content = json.dumps(content)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_a_folder_is_read_in_sorted_order_with_relative_ids_and_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "a.txt", ".hidden.txt", "a/.git/config.txt", "Makefile"):
        write(tmp_path / "corpus" / name, f"text of {name}")
    documents, failures = read(tmp_path / "corpus")
    assert [document.id for document in documents] == ["Makefile", "a/b/c.txt", "a/z.md", "a.txt", "b.txt"]
    assert [document.text for document in documents][1] == "text of a/b/c.txt"
    assert failures == []


def test_the_same_folder_elsewhere_gives_the_same_documents(tmp_path):
    for place in ("here", "there/and/further"):
        write(tmp_path / place / "corpus/sub/x.txt", "text")
        write(tmp_path / place / "corpus/r.jsonl", [{"text": "t"}])
    here, there = (read(tmp_path / place / "corpus")[0] for place in ("here", "there/and/further"))
    assert here == there
    assert all("/" not in document.id[:1] and str(tmp_path) not in document.id for document in here)


def test_one_path_stands_for_itself_as_a_string_too(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    assert [d.id for d in read_documents(str(path), on_failure=pytest.fail)] == ["a.txt"]
    assert [d.id for d in read_documents(Document("x", "text"), on_failure=pytest.fail)] == ["x"]


@pytest.mark.parametrize(
    ("name", "text", "title"),
    [
        ("x.md", "intro\n\n## The *river* ##\ntext", "The *river*"),
        ("x.md", "```\n# not this\n```\n# This", "This"),
        ("x.md", "#hashtag\ntext", "x"),
        ("x.txt", "\n\n# Heading\ntext", "Heading"),
        ("x.txt", "text\n# comment", "x"),
        ("my.notes.txt", "text", "my.notes"),
        ("x.txt.gz", "text", "x"),
        ("x.md", "# " + "long " * 1000, ("long " * 1000)[:200]),
        ("x.md", "", "x"),
    ],
)
def test_the_title_is_the_first_heading_or_the_stem(tmp_path, name, text, title):
    (document,), failures = read(write(tmp_path / name, text))
    assert (document.id, document.title, document.text, failures) == (name, title, text, [])


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_passage_corpora_of_the_field(tmp_path, packed):
    write(
        tmp_path / f"1.tsv{packed}", 'id\ttext\ttitle\n1\t"He said ""no"" \tthen"\tAda\n2\tplain "quoted" text\tBee\n'
    )
    write(tmp_path / f"2.jsonl{packed}", [{"id": 3, "title": "C", "section": "History", "text": "contriever"}])
    write(tmp_path / f"3.jsonl{packed}", [{"_id": "4", "title": "", "text": "beir", "metadata": {"url": "u"}, "n": 1}])
    write(tmp_path / f"4.json{packed}", [{"title": "D", "text": "list"}, {"title": None, "text": "other"}])
    write(tmp_path / f"5.tsv{packed}", "7\tmarco passage\r\n")
    write(tmp_path / f"6.json{packed}", b'\xef\xbb\xbf{"text": "one object"}')
    documents, failures = read(tmp_path)
    assert failures == []
    assert documents == [
        Document("1", 'He said "no" \tthen', "Ada"),
        Document("2", 'plain "quoted" text', "Bee"),
        Document("3", "contriever", "C: History"),
        Document("4", "beir", "", {"n": 1, "url": "u"}),
        Document(f"4.json{packed}#1", "list", "D"),
        Document(f"4.json{packed}#2", "other"),
        Document("7", "marco passage"),
        Document(f"6.json{packed}#1", "one object"),
    ]


def test_tsv_columns_are_named_by_a_header_in_any_order(tmp_path):
    documents, failures = read(write(tmp_path / "x.tsv", "title\tText\tid\tlang\nT\tbody\t9\ten\n"))
    assert documents == [Document("9", "body", "T", {"lang": "en"})]
    assert failures == []


def test_tsv_quotes_that_are_only_text_stay(tmp_path):
    (first, second), failures = read(write(tmp_path / "x.tsv", '1\t"Hello," he said\tT\n2\tan " alone\tT\n'))
    assert (first.text, second.text, failures) == ('"Hello," he said', 'an " alone', [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": 1}', "no string under 'text' (keys: id)"),
        (b'{"text": 5}', "no string under 'text'"),
        (b'{"text": "t", "id": 1.5}', "the id 1.5"),
        (b'{"text": "t", "id": true}', "the id True"),
        (b'{"text": "t", "title": ["x"]}', "title is ['x']"),
        (b'{"text": "t", "section": 3}', "section is 3"),
        (b'{"text": "t", "n": NaN}', "NaN is not JSON"),
        (b'{"text": "t"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["text"]', "a list, not an object"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 0xff at 10)"),
        (b'{"text": "a\x00b"}', "NUL byte at 11"),
    ],
)
def test_a_bad_line_costs_one_line(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", b'{"id": "a", "text": "1"}\n' + line + b'\n\n{"id": "b", "text": "2"}\n')
    documents, (failure,) = read(path)
    assert [document.id for document in documents] == ["a", "b"]
    assert failure.source == "x.jsonl:2"
    assert isinstance(failure.error, DocumentError)
    assert message in str(failure)
    assert failure.document_id is None


def test_tsv_lines_with_a_wrong_number_of_columns_fail_alone(tmp_path):
    path = write(tmp_path / "x.tsv", "id\ttext\ttitle\n1\ta\tT\n2\n3\tb\tT\textra\n4\tc\n")
    documents, failures = read(path)
    assert [document.id for document in documents] == ["1", "4"]
    assert [failure.source for failure in failures] == ["x.tsv:3", "x.tsv:4"]
    assert "4 columns where 3 are expected" in str(failures[1])


def test_a_tsv_whose_first_line_is_not_utf8_has_no_header(tmp_path):
    documents, (failure,) = read(write(tmp_path / "x.tsv", b"\xff\ttext\n1\tgood\n"))
    assert [document.text for document in documents] == ["good"]
    assert failure.source == "x.tsv:1"


def test_a_file_that_is_no_record_file_is_given_up(tmp_path):
    write(tmp_path / "a.jsonl", "not json\n" * 1000)
    write(tmp_path / "b.txt", "fine")
    documents, failures = read(tmp_path)
    assert [document.id for document in documents] == ["b.txt"]
    assert len(failures) == reading.MAX_CONSECUTIVE_FAILURES + 1
    assert "gave up after 100 bad records in a row" in str(failures[-1])


def test_json_that_is_one_bad_value_is_one_failure(tmp_path):
    documents, (failure,) = read(write(tmp_path / "x.json", "[1, 2"))
    assert documents == []
    assert failure.source == "x.json"
    assert "not valid JSON" in str(failure)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"\x7fELF\x00\x01", "binary or UTF-16 (NUL byte at 4)"),
        ("x.txt", "text".encode("utf-16"), "binary or UTF-16"),
        ("x.txt", "caf\xe9".encode("latin-1"), "not UTF-8 (byte 0xe9 at 3)"),
        ("x", b"\xff\xd8\xff\xe0", "not UTF-8"),
        ("x.pdf", b"%PDF-1.7 text", "pip install llama-index-readers-file"),
        ("x.html", b"<p>text</p>", "readers={'.html': reader}"),
        ("x.pdf.gz", b"%PDF", "unpack it with gunzip"),
    ],
)
def test_what_is_not_text_is_a_failure_with_the_next_step(tmp_path, name, data, message):
    write(tmp_path / name, data)
    write(tmp_path / "y.txt", "fine")
    documents, (failure,) = read(tmp_path)
    assert [document.id for document in documents] == ["y.txt"]
    assert (failure.source, failure.document_id) == (name, name)
    assert message in str(failure)
    assert "\n" not in str(failure)


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz", "x.json.gz"])
def test_damaged_gzip_is_a_failure_and_what_came_before_counts(tmp_path, name):
    whole = gzip.compress(b"".join(b'{"id": %d, "text": "%d"}\n' % (i, i * 7919) for i in range(5000)))
    write(tmp_path / "good.txt", "fine")
    for damage in (whole[: len(whole) // 2], b"not gzip at all", whole[:50] + b"\xff" * 40 + whole[90:]):
        (tmp_path / name).write_bytes(damage)
        documents, failures = read(tmp_path)
        assert "good.txt" in [document.id for document in documents]
        assert failures
        assert failures[-1].source == name
        assert all(isinstance(failure.error, DocumentError) for failure in failures)


def test_size_limits_bound_what_a_packed_file_can_become(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(reading, "MAX_RECORD_BYTES", 1000)
    write(tmp_path / "a.txt.gz", "a" * 1001)
    write(tmp_path / "b.txt", "b" * 1000)
    write(tmp_path / "c.jsonl.gz", '{"text": "c"}\n' + " " * 1001)
    documents, failures = read(tmp_path)
    assert [document.id for document in documents] == ["b.txt", "c.jsonl.gz#1"]
    assert ["more than 1000 bytes" in str(failure) for failure in failures] == [True, True]


def test_line_ends_and_the_byte_order_mark(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"id": "b", "text": "one\\r\\ntwo"}\r\n')
    (first, second), _ = read(tmp_path)
    assert first.text == "one\ntwo\nthree\n"
    assert second.text == "one\ntwo"


def test_lone_surrogates_become_replacement_characters(tmp_path):
    record = b'{"id": "\\ud800", "text": "a\\udfffb \\ud83d\\ude00", "title": "\\ud800", "k\\udc00": ["\\ud800"]}'
    (document,), failures = read(write(tmp_path / "x.jsonl", record))
    assert document == Document("\ufffd", "a\ufffdb \U0001f600", "\ufffd", {"k\ufffd": ["\ufffd"]})
    assert failures == []


@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=4, max_size=4))
@settings(deadline=None)
def test_any_json_strings_become_an_encodable_document(strings):
    document = reading._from_record(
        json.loads(json.dumps({"text": strings[0], "title": strings[1], strings[2]: strings[3]})), "x#1"
    )
    for value in (document.id, document.text, document.title, json.dumps(dict(document.metadata), ensure_ascii=False)):
        value.encode()


def test_ids_used_twice_keep_the_first_and_name_both(tmp_path):
    write(tmp_path / "one/a.txt", "first")
    write(tmp_path / "two/a.txt", "second")
    write(
        tmp_path / "two/r.jsonl", [{"id": "a.txt", "text": "third"}, {"id": "r", "text": "4"}, {"id": "r", "text": "5"}]
    )
    documents, failures = read(tmp_path / "one", tmp_path / "two", Document("r", "6"))
    assert [document.text for document in documents] == ["first", "4"]
    assert "'a.txt' is used twice, by a.txt and by r.jsonl:1" in str(failures[1])
    assert "'r' is used twice, by r.jsonl:2 and by r.jsonl:3" in str(failures[2])
    assert "'r' is used twice, by r.jsonl:2 and by sources[2]" in str(failures[3])
    assert [failure.document_id for failure in failures] == ["a.txt", "a.txt", "r", "r"]


def test_a_file_reached_twice_is_read_once(tmp_path):
    path = write(tmp_path / "sub/a.txt", "text")
    (tmp_path / "sub/link.txt").symlink_to(path)
    documents, failures = read(tmp_path, path, tmp_path / "sub")
    assert [document.id for document in documents] == ["sub/a.txt"]
    assert failures == []


def test_links_to_folders_and_broken_links_are_told_and_not_followed(tmp_path):
    write(tmp_path / "outside/secret.txt", "secret")
    write(tmp_path / "corpus/a.txt", "text")
    (tmp_path / "corpus/loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus/out").symlink_to(tmp_path / "outside")
    (tmp_path / "corpus/gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "corpus/pipe")
    documents, failures = read(tmp_path / "corpus")
    assert [document.id for document in documents] == ["a.txt"]
    assert [failure.document_id for failure in failures] == ["gone.txt", "loop", "out", "pipe"]


@pytest.mark.parametrize("source", ["no/such/file", "nul\x00byte", ""])
def test_a_missing_source_fails_alone(tmp_path, source):
    path = write(tmp_path / "a.txt", "text")
    documents, failures = read(source, path) if source else read("/dev/null", path)
    assert [document.id for document in documents] == ["a.txt"]
    assert failures[0].document_id is None


def test_a_folder_that_cannot_be_listed_fails_alone(tmp_path, monkeypatch):
    write(tmp_path / "locked/a.txt", "text")
    write(tmp_path / "open.txt", "text")
    iterdir = Path.iterdir

    def refuse(self):
        # What the operating system does for a folder without permission; root is let in everywhere.
        if self.name == "locked":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    documents, (failure,) = read(tmp_path)
    assert [document.id for document in documents] == ["open.txt"]
    assert "cannot list the folder 'locked' (Permission denied)" in str(failure)
    assert failure.document_id is None


def test_hostile_file_names(tmp_path):
    names = ["a#1.txt", "new\nline.txt", "\u202eevil.txt", "😀.txt", "q'\"uote.txt", "-rf.txt", "%2e%2e.txt"]
    for name in names:
        write(tmp_path / "corpus" / name, "text")
    Path(os.fsdecode(os.fsencode(tmp_path / "corpus") + b"/\xff\xfe.txt")).write_text("text")
    documents, failures = read(tmp_path / "corpus")
    assert {document.id for document in documents} == {*names, "\ufffd\ufffd.txt"}
    assert failures == []


def test_folders_deeper_than_python_recurses(tmp_path):
    here = Path.cwd()
    depth = sys.getrecursionlimit() + 100
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            Path("d").mkdir()
            os.chdir("d")
        Path("a.txt").write_text("text")
    finally:
        os.chdir(here)
    try:
        documents, failures = read(tmp_path)
        assert [document.text for document in documents] == ["text"]
        assert failures == []
    finally:
        # Nothing in the standard library removes this in one call on every Python.
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_passages_with_the_same_document_are_one_document_and_stay_as_they_are():
    passages = [Passage("d#0", "one", "T", "d"), Passage("d#1", "two", "T", "d"), Passage("solo", "three")]
    documents, failures = read(*passages, Document("x", "four"), Passage("d#2", "late", "T", "d"))
    assert [document.id for document in documents] == ["d", "solo", "x"]
    assert documents[0].passages == tuple(passages[:2])
    assert documents[0].text == "one\ntwo"
    assert "'d' is used twice" in str(failures[0])


def test_objects_of_other_types_fail_alone():
    documents, (failure,) = read(Document("x", "text"), 42, Document("y", "text"))
    assert [document.id for document in documents] == ["x", "y"]
    assert isinstance(failure.error, InputError)
    assert "sources[1] is a int" in str(failure)


def test_documents_refuse_what_cannot_be_stored():
    with pytest.raises(DocumentError, match="non-empty id"):
        Document("", "text")
    with pytest.raises(DocumentError, match="lone surrogate at character 1"):
        Document("x", "a\ud800")


def test_a_failure_handler_that_raises_stops_the_reading(tmp_path):
    write(tmp_path / "a.pdf", "x")

    def stop(failure):
        raise failure.error

    with pytest.raises(DocumentError, match="needs a reader"):
        list(read_documents([tmp_path], on_failure=stop))


def test_reading_is_lazy(tmp_path):
    write(tmp_path / "a.jsonl", [{"id": "1", "text": "one"}, {"id": "2", "text": "two"}])
    documents = read_documents([tmp_path / "a.jsonl", tmp_path / "later.txt"], on_failure=pytest.fail)
    assert next(documents).id == "1"
    write(tmp_path / "later.txt", "written after the start")
    assert [document.text for document in documents] == ["two", "written after the start"]


class TestLlamaIndex:
    """The real llama-index-core: its documents, and readers made for it."""

    def test_documents_are_taken_with_their_id(self):
        schema = pytest.importorskip("llama_index.core.schema")
        node = schema.Document(text="a\r\nb\ud800", id_="doc-1", metadata={"title": "T", "path": Path("x"), "n": [1]})
        documents, failures = read(node, schema.TextNode(text="n", id_="node-1", metadata={"title": 3}))
        assert documents == [
            Document("doc-1", "a\nb\ufffd", "T", {"title": "T", "path": "x", "n": [1]}),
            Document("node-1", "n", "", {"title": 3}),
        ]
        assert failures == []
        assert [d.id for d in read_documents(node, on_failure=pytest.fail)] == ["doc-1"]

    def test_metadata_that_is_not_json_fails_alone(self):
        schema = pytest.importorskip("llama_index.core.schema")
        bad = schema.Document(text="t", id_="doc-1", metadata={"x": float("nan")})
        documents, (failure,) = read(bad, schema.Document(text="t", id_="doc-2"))
        assert [document.id for document in documents] == ["doc-2"]
        assert "metadata cannot be written as JSON" in str(failure)

    def test_readers_by_suffix(self, tmp_path):
        from llama_index.core.readers.base import BaseReader
        from llama_index.core.schema import Document as LlamaDocument

        class Pages(BaseReader):
            def load_data(self, file, extra_info=None):
                data = Path(file).read_bytes()
                if data == b"broken":
                    raise KeyError("no such page")
                return [LlamaDocument(text=page) for page in data.decode().split("|")]

        write(tmp_path / "a.PAGE", "one|two\r\n||three")
        write(tmp_path / "b.page", "broken")
        write(tmp_path / "c.page", "bin\x00ary")
        write(tmp_path / "d.json", "own|reader")
        documents, failures = read(tmp_path, readers={".page": Pages(), ".JSON": Pages()})
        assert documents == [Document("a.PAGE", "one\n\ntwo\n\n\nthree", "a"), Document("d.json", "own\n\nreader", "d")]
        assert [failure.document_id for failure in failures] == ["b.page", "c.page"]
        assert "Pages failed ('no such page')" in str(failures[0])
        assert "gave binary data" in str(failures[1])

    def test_the_readers_package_is_used_where_installed(self, tmp_path):
        """A package under the name and with the members SimpleDirectoryReader looks for, on the import path."""
        names = "DocxReader EpubReader HWPReader ImageReader IPYNBReader MboxReader PandasCSVReader PandasExcelReader"
        names += " PDFReader PptxReader VideoAudioReader"
        module = "from llama_index.core.readers.base import BaseReader\nfrom llama_index.core.schema import Document\n"
        for name in names.split():
            module += textwrap.dedent(f"""
                class {name}(BaseReader):
                    def load_data(self, file, extra_info=None):
                        return [Document(text=f"{name} read {{file.name}}")]
            """)
        write(tmp_path / "site/llama_index/readers/file/__init__.py", module)
        write(tmp_path / "corpus/a.pdf", "%PDF")
        write(tmp_path / "corpus/b.csv", "a,b")
        write(tmp_path / "corpus/c.html", "<p>")
        program = (
            "from blockrag.ingest import read_documents\n"
            "failures = []\n"
            "for d in read_documents('corpus', on_failure=failures.append): print(d.id, d.text)\n"
            "for f in failures: print(f)\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(Path.cwd())])}
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.splitlines()[:2] == ["a.pdf PDFReader read a.pdf", "b.csv PandasCSVReader read b.csv"]
        assert "no default reader for '.html'" in result.stdout


def test_reading_imports_no_heavy_library(tmp_path):
    write(tmp_path / "a.md", "text")
    write(tmp_path / "b.pdf", "text")
    program = (
        "import sys; from blockrag.ingest import read_documents\n"
        "list(read_documents(sys.argv[1], on_failure=lambda failure: None))\n"
        "print([name for name in ('torch', 'transformers', 'llama_index.core', 'faiss') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_large_record_file_is_streamed(tmp_path):
    """Taking one record of a packed file reads only its beginning: damage at the end does no harm yet."""
    buffer = io.BytesIO()
    with gzip.open(buffer, "wt") as stream:
        for number in range(200_000):
            stream.write(json.dumps({"id": number, "text": f"text {number * 7919 % 10007}"}) + "\n")
    (tmp_path / "x.jsonl.gz").write_bytes(buffer.getvalue()[:-100])
    documents = read_documents(tmp_path / "x.jsonl.gz", on_failure=pytest.fail)
    assert next(documents).id == "0"
    documents.close()
