"""The command: what it prints, how it ends, and that what was done is still there after a kill.

The checkpoint has the demo's layout and random weights, so answers are nonsense; everything around them is real.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from tiny_models import LONGROPE, ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

import blockrag
from blockrag.cli import app, asking, main
from blockrag.cli.batch import open_output, read_lines
from blockrag.cli.directory import SETTINGS_FILE, Settings, find_settings, model_name, remember
from blockrag.cli.indexing import size
from blockrag.cli.output import Output, clean, dump_json, reporting
from blockrag.demo import forms
from blockrag.errors import InputError, PassageIndexError
from blockrag.model.facts import BlockAttentionFacts, save_facts

DOCUMENTS = {
    "arvo.txt": "Arvo is a country. The capital of Arvo is Tellin.",
    "brask.txt": "Brask is a country. The capital of Brask is Onder.",
    "cend.md": "# Cend\nCend is a country. The capital of Cend is Umbra.",
}
QUESTION = "What is the capital of Brask?"
SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(autouse=True, scope="module")
def _leave_transformers_as_it_was() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.set_verbosity(verbosity)
    if bars:
        transformers_logging.enable_progress_bar()


def save_checkpoint(directory: Path, case: ModelCase, *, fine_tuned: bool | None = True) -> str:
    tiny_model(case).save_pretrained(directory)
    plain_tokenizer().save_pretrained(directory)
    if fine_tuned:
        save_facts(BlockAttentionFacts(block_fine_tuned=True, template=forms.template()), directory)
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    return save_checkpoint(tmp_path_factory.mktemp("model"), ModelCase("small", "llama", shape))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another one, of which nobody knows whether it was fine-tuned, with windows and two frequencies."""
    windows = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    return save_checkpoint(
        tmp_path_factory.mktemp("other"), ModelCase("other", "gemma3_text", windows), fine_tuned=None
    )


@pytest.fixture(scope="module")
def refused_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("refused"), ModelCase("gpt2", "gpt2"), fine_tuned=None)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture
def index(tmp_path: Path, model: str, documents: Path) -> Path:
    path = tmp_path / "index"
    assert run("ingest", documents, "--path", path, "--model", model).exit_code == 0
    return path


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments: object, code: int = 0, stdin: str | None = None) -> Any:
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1, "one line of JSON and nothing else"
    return json.loads(result.stdout)


def refused(code: int, *arguments: object, stdin: str | None = None) -> str:
    """Run what must fail with this code; returns the one line it says."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "", "COLUMNS": "80"}


# -- the command itself -----------------------------------------------------------------------------------------------


def test_version_and_module_in_a_real_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blockrag", "--version"], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"blockrag {blockrag.__version__}\n", "")


def test_main_is_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "--version"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"blockrag {blockrag.__version__}\n"


def test_a_mistake_is_answered_without_loading_heavy_libraries() -> None:
    code = (
        "import sys; from blockrag.cli import app\n"
        "try: app(['ingest', 'no-such-file', '--path', 'x'])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "2 []\n"
    assert done.stderr == "error: there is no file or folder 'no-such-file'; pass paths that exist\n"


@pytest.mark.parametrize(
    "command",
    ["", "demo", "ingest", "query", "chat", "stats", "delete", "verify", "verify-store", "generate"],
    ids=lambda c: c or "app",
)
def test_help_names_every_exit_code_and_fits_the_terminal(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80"}, prog_name="blockrag")
    assert result.exit_code == 0
    for code in ("0  everything", "1  it ran", "2  a mistake", "3  the store", "130  interrupted"):
        assert code in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\x1b" not in result.stdout
    assert "\b" not in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["query", QUESTION],
        ["query", QUESTION, "--path", "x", "--attention", "some"],
        ["query", QUESTION, "--path", "x", "-k", "-1"],
        ["ingest", "--path", "x"],
    ],
)
def test_arguments_that_do_not_parse_are_a_users_mistake(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


def test_a_defect_keeps_its_traceback() -> None:
    def broken() -> None:
        with reporting(False):
            raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        broken()


def test_an_interruption_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    def interrupted(_: object) -> Iterator[str]:
        raise KeyboardInterrupt
        yield ""

    monkeypatch.setattr(asking, "_questions", interrupted)
    assert "interrupted" in refused(130, "chat", "--path", index)
    assert run_json("chat", "--path", index, code=130)["error"]["type"] == "KeyboardInterrupt"


def test_advice_of_other_libraries_is_shown_only_where_python_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def advise() -> None:
        with reporting(False):
            warnings.warn("some advice", UserWarning, stacklevel=1)

    advise()
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with pytest.warns(UserWarning, match="some advice"):
        advise()


def test_text_cannot_steer_the_terminal() -> None:
    assert clean("a\x1b[2Jb\r\n\tc\x9b\ud800") == "a\ufffd[2Jb\ufffd\n\tc\ufffd\ufffd"


def test_json_is_readable_where_the_encoding_allows_it() -> None:
    assert dump_json({"a": "é"}) == '{"a": "é"}'
    assert dump_json({"a": "é"}, encoding="ascii") == '{"a": "\\u00e9"}'
    assert dump_json({"a": "\ud800"}) == '{"a": "\\ud800"}'


def test_models_by_name_and_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "mine").mkdir()
    assert model_name("demo") == "demo"
    assert model_name("mine") == model_name("./mine") == str(tmp_path / "mine")
    assert model_name("owner/name") == "owner/name"


def test_sizes_have_binary_units() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 30, 1 << 50)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB", "1024.0 TiB"]


# -- ingest, stats, delete --------------------------------------------------------------------------------------------


def test_ingest_twice_computes_once(tmp_path: Path, model: str, documents: Path) -> None:
    path = tmp_path / "deep" / "index"
    first = run_json("ingest", documents, "--path", path, "--model", model, "--max-bytes", "1GB")
    assert (first["documents"], first["blocks_new"], first["failures"]) == (3, 3, [])
    assert first["tokens_new"] > 0
    assert first["max_bytes"] == 10**9
    second = run_json("ingest", documents, "--path", path)
    assert (second["documents_unchanged"], second["blocks_new"], second["model"]) == (3, 0, model)
    assert find_settings(path) == Settings(model=model, max_bytes=10**9)
    shown = run("ingest", documents, "--path", path)
    assert shown.exit_code == 0
    assert "3 documents (3 unchanged)" in shown.stdout
    assert shown.stderr == ""


def test_precision_is_remembered(tmp_path: Path, model: str, documents: Path) -> None:
    path = tmp_path / "index"
    first = run_json("ingest", documents, "--path", path, "--model", model, "--precision", "int8")
    assert (first["precision"], first["blocks_new"]) == ("int8", 3)
    assert find_settings(path) == Settings(model=model, precision="int8")
    asked = run_json("query", QUESTION, "--path", path)
    assert asked["usage"]["blocks_computed"] == 1, "the query block; the passages were found"
    # Other numbers at rest are other blocks.
    again = run_json("ingest", documents, "--path", path, "--precision", "float32")
    assert (again["precision"], again["blocks_new"]) == ("float32", 3)
    assert run("ingest", documents, "--path", path, "--precision", "int16").exit_code == 2
    settings_file = path / "blockrag.json"
    settings_file.write_text(settings_file.read_text("utf-8").replace("float32", "int16"), "utf-8")
    assert "precision cannot be 'int16'" in refused(3, "query", QUESTION, "--path", path)


def test_ingest_goes_on_past_bad_documents(tmp_path: Path, index: Path, documents: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "ok", "text": "Dorn is a country."}\n{"no": "text"}\nnot json\n', "utf-8")
    result = run_json("ingest", bad, "--path", index, code=1)
    assert result["documents"] == 1
    assert [failure["source"] for failure in result["failures"]] == ["bad.jsonl:2", "bad.jsonl:3"]
    shown = run("ingest", bad, "--path", index)
    assert shown.exit_code == 1
    assert "bad.jsonl:3" in shown.stdout
    assert shown.stderr.startswith("error: 2 documents failed")


def test_prune_removes_what_the_sources_lack(index: Path, documents: Path) -> None:
    kept = documents / "arvo.txt"
    result = run_json("ingest", kept, "--path", index, "--prune")
    assert result["documents_removed"] == 2
    assert run_json("stats", "--path", index)["index"]["documents"] == 1


def test_stats_and_delete(index: Path) -> None:
    stats = run_json("stats", "--path", index, "--documents")
    assert stats["settings"]["encoder"] == "lexical"
    assert (stats["index"]["documents"], stats["store"]["blocks"]) == (3, 4)
    assert [d["document_id"] for d in stats["documents"]] == sorted(DOCUMENTS)
    shown = run("stats", "--path", index, "--documents").stdout
    assert "brask.txt" in shown
    assert "lexical" in shown
    deleted = run_json("delete", "brask.txt", "--path", index)
    assert deleted == {"document_id": "brask.txt", "passages_deleted": 1, "blocks_deleted": 1}
    assert "arvo.txt: deleted with 1 passage and 1 block" in run("delete", "arvo.txt", "--path", index).stdout
    assert run_json("stats", "--path", index)["store"]["blocks"] == 2
    assert "--documents" in refused(2, "delete", "brask.txt", "--path", index)


def test_missing_places_are_a_users_mistake(tmp_path: Path, model: str, documents: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    nothing = tmp_path / "nothing"
    assert "no file or folder" in refused(2, "ingest", tmp_path / "gone", "--path", nothing)
    assert "is a file" in refused(2, "ingest", documents, "--path", file, "--model", model)
    assert "is a file" in refused(2, "query", QUESTION, "--path", file)
    assert "cannot be made" in refused(2, "ingest", documents, "--path", file / "below", "--model", model)
    assert "no model directory" in refused(2, "ingest", documents, "--path", nothing, "--model", "./gone")
    assert "cannot read the size" in refused(2, "ingest", documents, "--path", nothing, "--max-bytes", "much")
    for command in (["query", QUESTION], ["chat"], ["stats"], ["delete", "x"]):
        assert "blockrag ingest" in refused(2, *command, "--path", nothing)
    assert not nothing.exists()
    error = run_json("stats", "--path", nothing, code=2)["error"]
    assert error["type"] == "InputError"
    assert "no index" in error["message"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path, model: str, documents: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be made" in refused(2, "ingest", documents, "--path", tmp_path / "index", "--model", model)


def test_unknown_encoder_and_model_are_not_remembered(tmp_path: Path, model: str, documents: Path) -> None:
    path = tmp_path / "index"
    assert "unknown encoder" in refused(2, "ingest", documents, "--path", path, "--model", model, "--encoder", "nope")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "cannot load" in refused(2, "ingest", documents, "--path", path, "--model", empty)
    assert find_settings(path) is None


# -- what a directory remembers ---------------------------------------------------------------------------------------


def test_another_model_is_refused_unless_it_is_meant(
    index: Path, model: str, other_model: str, documents: Path
) -> None:
    message = refused(2, "ingest", documents, "--path", index, "--model", other_model)
    assert "--switch-model" in message
    assert "encoder" in refused(2, "ingest", documents, "--path", index, "--encoder", "lexical:64")
    assert "encoder" in refused(2, "query", QUESTION, "--path", index, "--encoder", "lexical:64")
    switched = run_json("ingest", documents, "--path", index, "--model", other_model, "--switch-model")
    assert switched["blocks_new"] == 3
    # Nothing of the first model's was lost.
    back = run_json("ingest", documents, "--path", index, "--model", model, "--switch-model")
    assert (back["documents_unchanged"], back["blocks_new"]) == (3, 0)


def test_a_question_may_use_another_model(index: Path, other_model: str) -> None:
    result = run("query", QUESTION, "--path", index, "--model", other_model, *SHORT)
    assert result.exit_code == 0
    note, warning, reason = result.stderr.splitlines()
    assert "4 blocks are missing" in reason
    assert "another model's, for weights, config, rope, template, attention differ" in reason
    assert note.startswith("note: ")
    assert warning.startswith("warning: ")
    assert "not known to be fine-tuned for block attention" in warning
    assert find_settings(index).model != other_model


def test_an_index_of_the_python_api_needs_its_model_named(index: Path, model: str, documents: Path) -> None:
    (index / SETTINGS_FILE).unlink()
    assert "--model" in refused(2, "query", QUESTION, "--path", index)
    assert "--model" in refused(2, "ingest", documents, "--path", index)
    assert run_json("query", QUESTION, "--path", index, "--model", model, *SHORT)["usage"]["blocks_reused"] == 4
    shown = run("stats", "--path", index)
    assert "not remembered" in shown.stdout
    again = run_json("ingest", documents, "--path", index, "--model", model, "--encoder", "lexical")
    assert again["documents_unchanged"] == 3
    assert find_settings(index) == Settings(model=model)


def test_a_model_that_moved(index: Path, model: str, tmp_path: Path) -> None:
    settings = index / SETTINGS_FILE
    settings.write_text(settings.read_text().replace(model, str(tmp_path / "gone")))
    assert "new place" in refused(2, "query", QUESTION, "--path", index)
    assert run("query", QUESTION, "--path", index, "--model", model, *SHORT).exit_code == 0


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 1, "model": 3}',
        '{"format": 1, "nonsense": 3}',
        '{"format": 1, "attention": "some"}',
        '{"format": 1, "max_passage_tokens": true}',
        '{"format": 1, "max_passage_tokens": 0}',
        '{"format": 1, "max_passage_tokens": -1}',
        '{"format": 1, "max_bytes": 0}',
        '{"format": 1, "max_bytes": 1e400}',
        '{"format": 1, "max_bytes": ' + "9" * 5000 + "}",
        '{"format": 1, "model": "' + "m" * 70_000 + '"}',
        '{"format": 1, "precision": ["int8"]}',
        "[" * 60_000,
        '{"model": "demo"}',
        '{"format": 9}',
    ],
)
def test_damaged_settings_are_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / SETTINGS_FILE).write_text(content)
    with pytest.raises(PassageIndexError, match=r"blockrag\.json"):
        find_settings(tmp_path)
    assert "blockrag.json" in refused(3, "query", QUESTION, "--path", tmp_path)


def test_settings_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(tmp_path / SETTINGS_FILE)
        assert "cannot be read" in refused(2, "query", QUESTION, "--path", tmp_path)
        if make is not Path.mkdir:
            (tmp_path / SETTINGS_FILE).unlink()
        else:
            (tmp_path / SETTINGS_FILE).rmdir()
    (tmp_path / SETTINGS_FILE).mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        remember(tmp_path, Settings())
    assert [file.name for file in tmp_path.iterdir()] == [SETTINGS_FILE], "no half-written file stays"


def test_a_damaged_index_or_store_is_code_3(index: Path) -> None:
    (index / "index" / "passages.sqlite3").write_bytes(b"not a database at all" * 100)
    assert run("query", QUESTION, "--path", index).exit_code == 3
    assert run_json("stats", "--path", index, code=3)["error"]["type"] == "PassageIndexError"


def test_a_damaged_block_is_recomputed_with_a_warning(index: Path) -> None:
    with closing(sqlite3.connect(index / "kv" / "cache.db")) as connection, connection:
        assert connection.execute("UPDATE Cache SET value = zeroblob(length(value))").rowcount == 4
    result = run("query", QUESTION, "--path", index, *SHORT)
    assert result.exit_code == 0
    assert "(4 were damaged)" in result.stdout
    assert [line[:15] for line in result.stderr.splitlines()] == ["warning: block "] * 4
    assert run("query", QUESTION, "--path", index, *SHORT).stderr == ""


# -- query and chat ---------------------------------------------------------------------------------------------------


def test_query_reuses_every_block_and_says_so(index: Path) -> None:
    result = run_json("query", QUESTION, "--path", index, "-k", 2, *SHORT)
    assert set(result) == {"question", "answer", "finish_reason", "attention", "sources", "usage", "timings"}
    assert result["sources"][0]["document_id"] == "brask.txt"
    assert set(result["sources"][0]) == {"passage_id", "document_id", "title", "text", "score"}
    assert (len(result["sources"]), result["usage"]["blocks_reused"], result["usage"]["blocks_computed"]) == (2, 3, 1)
    assert result["timings"]["ttft_s"] > result["timings"]["query_prefill_s"] > 0
    full = run_json("query", QUESTION, "--path", index, "-k", 2, "--attention", "full", *SHORT)
    assert (full["attention"], full["usage"]["tokens_reused"]) == ("full", 0)
    assert full["usage"]["prompt_tokens"] == result["usage"]["prompt_tokens"]


def test_query_streams_the_same_text(index: Path) -> None:
    arguments = ("query", QUESTION, "--path", index, *SHORT)
    whole, streamed = run(*arguments, "--no-stream"), run(*arguments, "--stream")
    answer = clean(run_json(*arguments)["answer"])
    assert whole.stdout.startswith(f"{answer}\n\n1  ")
    assert streamed.stdout.startswith(f"{answer}\n\n1  ")
    assert "tokens reused in 4 blocks" in whole.stdout
    assert "first token after" in whole.stdout
    assert whole.stderr == ""
    assert "\x1b" not in whole.stdout
    assert run_json(*arguments, "--stream")["answer"] == run_json(*arguments)["answer"]


def test_sampling_is_repeatable(index: Path) -> None:
    arguments = ("query", QUESTION, "--path", index, "--temperature", 2, *SHORT)
    one, two, three = (run_json(*arguments, "--seed", seed)["answer"] for seed in (1, 1, 2))
    assert one == two != three


def test_query_without_passages(index: Path) -> None:
    result = run("query", QUESTION, "--path", index, "-k", 0, *SHORT)
    assert result.exit_code == 0
    assert "no passage was found" in result.stdout


def test_bad_questions_are_a_users_mistake(index: Path, model: str) -> None:
    assert "the question is empty" in refused(2, "query", "  ", "--path", index)
    assert "max_new_tokens" in refused(2, "query", QUESTION, "--path", index, "--max-new-tokens", 0)
    assert "temperature" in refused(2, "query", QUESTION, "--path", index, "--temperature", -1)
    assert "tokens" in refused(2, "query", "why? " * 3000, "--path", index)
    assert "cannot be used" in refused(2, "verify", model, "--device", "abacus")


def test_chat_takes_lines_and_keeps_what_it_knows(index: Path) -> None:
    questions = f"{QUESTION}\n\n  What is the capital of Arvo?  \n"
    turns = run_json("chat", "--path", index, "-k", 1, *SHORT, stdin=questions)["turns"]
    assert [turn["question"] for turn in turns] == [QUESTION, "What is the capital of Arvo?"]
    assert [turn["new_conversation"] for turn in turns] == [True, False]
    assert turns[0]["usage"]["blocks_reused"] == 2
    assert turns[1]["usage"]["blocks_reused"] >= 1
    shown = run("chat", "--path", index, *SHORT, stdin=questions)
    assert shown.exit_code == 0
    assert shown.stdout.count("first token after") == 2
    assert f"> {QUESTION}\n" in shown.stdout
    assert run("chat", "--path", index, stdin="").stdout == ""


def test_a_chat_that_grew_too_long_begins_anew(index: Path) -> None:
    # Two such questions and their passages exceed the 2,048 tokens that the model can place.
    too_long = "why? " * 3000
    long = "why? " * (1100 * 100 // len(plain_tokenizer()("why? " * 100).input_ids))
    result = run("chat", "--path", index, *SHORT, stdin=f"{long}\n{long}\n")
    assert result.exit_code == 0
    assert "starting a new one" in result.stderr
    turns = run_json("chat", "--path", index, *SHORT, stdin=f"{too_long}\n{long}\n{too_long}\n{QUESTION}\n", code=1)[
        "turns"
    ]
    assert [set(turn) == {"question", "error"} for turn in turns] == [True, False, True, False]
    assert [turn.get("new_conversation") for turn in turns] == [None, True, None, True]


def test_somebody_who_types_is_prompted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("one\n\ntwo\n"))
    assert list(asking._questions(Output(as_json=False))) == ["one", "two"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "one question per line; end with Ctrl-D\n> > > > "


def unread(pipe: IO[str]) -> int:
    """Bytes in a pipe that its reader has not taken."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_chat_in_a_real_process_is_interrupted_cleanly(index: Path) -> None:
    command = [sys.executable, "-m", "blockrag", "chat", "--path", str(index), *SHORT]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{QUESTION}\n")
        process.stdin.flush()
        lines = []
        while not lines or not lines[-1].startswith("first token after"):
            lines.append(process.stdout.readline())
            assert lines[-1], "the process ended early"
        # Until it asks for the next question, and takes a blank line for none: Python drops an interrupt that falls
        # into a finalizer, of which there are some when an answer ends.
        process.stdin.write("\n")
        process.stdin.flush()
        while unread(process.stdin):
            assert process.poll() is None, "the process ended early"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors.startswith("error: interrupted")
    assert errors.count("\n") == 1


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_prints_what_the_probes_found(model: str, other_model: str) -> None:
    result = run("verify", model)
    assert result.exit_code == 0
    for text in (
        "blockrag_folded",
        "shift probe",
        "equivalence",
        "2,048 tokens",
        "half[0:16]",
        "block-fine-tuned  yes",
    ):
        assert text in result.stdout
    assert result.stderr == ""
    found = run_json("verify", other_model)
    assert found["supported"] is True
    assert found["equivalence_error"] < 1e-3 * found["logit_scale"]
    layers = found["regimes"][0]["layers"]
    assert [layer["window"] for layer in layers] == [8, None, 8, None]
    assert layers[0]["slowest_turn_tokens"] != layers[1]["slowest_turn_tokens"]
    assert found["block_fine_tuned"] is None


def test_verify_shows_both_regimes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, ModelCase("phi3", "phi3", LONGROPE))
    shown = run("verify", path).stdout
    assert "short regime" in shown
    assert "short position factors up to 64" in " ".join(shown.split())
    assert [regime["name"] for regime in run_json("verify", path)["regimes"]] == ["short", "long"]


def test_verify_refuses_with_the_reason(refused_model: str, tmp_path: Path) -> None:
    result = run("verify", refused_model)
    assert result.exit_code == 1
    assert "is refused" in result.stdout
    assert "cannot reuse block KV states" in result.stderr
    assert run_json("verify", refused_model, code=1)["supported"] is False
    assert "no model directory" in refused(2, "verify", tmp_path / "gone")


def test_a_refused_model_still_answers_in_full(refused_model: str, tmp_path: Path, documents: Path) -> None:
    path = tmp_path / "index"
    assert "cannot reuse" in refused(1, "ingest", documents, "--path", path, "--model", refused_model)
    full = ("--model", refused_model, "--attention", "full")
    assert run_json("ingest", documents, "--path", path, *full)["blocks_new"] == 0
    answer = run_json("query", QUESTION, "--path", path, *SHORT)
    assert answer["attention"] == "full"
    assert len(answer["sources"]) == 3


# -- generate ---------------------------------------------------------------------------------------------------------

RAG_PROMPT = f"{forms.PREFIX}Title: Brask\nThe capital of Brask is Onder.\nQuestion: {QUESTION}\nAnswer:"


def batch(tmp_path: Path, *lines: object) -> tuple[Path, Path]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return source, target


def generate(model: str, source: Path, target: Path, *more: object, code: int = 0) -> Any:
    return run_json("generate", "--model", model, "--input", source, "--output", target, *SHORT, *more, code=code)


def results(target: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in target.read_text("utf-8").split("\n") if line]


def test_generate_takes_every_form(tmp_path: Path, model: str) -> None:
    source, target = batch(
        tmp_path,
        {"id": 7, "prompt": RAG_PROMPT, "generated": "old", "error": "old"},
        "",
        {"prompt": "Just some text"},
        {"blocks": ["One. ", "Two. ", "Three?"], "note": "é"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER]},
    )
    summary = generate(model, source, target)
    assert (summary["generated"], summary["skipped"], summary["failed"]) == (4, 0, 0)
    rag, text, blocks, messages = results(target)
    assert rag["id"] == 7
    assert set(rag) == {"id", "prompt", "generated", "usage", "finish_reason"}
    assert rag["usage"]["blocks_computed"] == 3, "prefix, passage, question"
    assert text["usage"]["blocks_computed"] == 1
    assert blocks["usage"]["blocks_computed"] == 3
    assert blocks["note"] == "é"
    assert messages["usage"]["blocks_computed"] == 3
    assert "é" in target.read_text("utf-8")


USER = {"role": "user", "content": "c"}


def test_generate_formats_decide_what_a_prompt_is(tmp_path: Path, model: str) -> None:
    source, target = batch(tmp_path, {"prompt": RAG_PROMPT, "blocks": ["a", "b"]}, {"prompt": "no rag prompt"})
    generate(model, source, target, "--format", "text")
    assert [line["usage"]["blocks_computed"] for line in results(target)] == [1, 1]
    target.unlink()
    generate(model, source, target, "--format", "rag", code=1)
    good, bad = results(target)
    assert good["usage"]["blocks_computed"] == 3
    assert "the prompt begins with" in bad["error"]
    target.unlink()
    generate(model, source, target, "--format", "blocks", code=1)
    assert "there is no 'blocks'" in results(target)[1]["error"]


def test_generate_reuses_blocks_of_a_store(tmp_path: Path, model: str) -> None:
    source, target = batch(tmp_path, {"prompt": RAG_PROMPT})
    store = f"disk://{tmp_path}/kv"
    generate(model, source, target, "--store", store)
    first = results(target)[0]
    target.unlink()
    generate(model, source, target, "--store", store)
    second = results(target)[0]
    assert (first["usage"]["blocks_reused"], second["usage"]["blocks_reused"]) == (0, 2)
    assert first["generated"] == second["generated"]
    target.unlink()
    generate(model, source, target, "--attention", "full")
    assert results(target)[0]["usage"]["blocks_computed"] == 1


def test_generate_writes_bad_lines_and_goes_on(tmp_path: Path, model: str) -> None:
    lines = [
        "not json",
        "[1]",
        '{"prompt": NaN}',
        '{"prompt": "a", "score": 1e999}',
        {"nothing": 1},
        {"prompt": "a", "blocks": ["b"]},
        {"prompt": 3},
        {"blocks": "text"},
        {"blocks": ["a", ""]},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"prompt": ""},
        {"prompt": "why? " * 3000},
        {"prompt": "\ud800"},
        {"prompt": "good"},
    ]
    source, target = batch(tmp_path, *lines)
    with source.open("ab") as file:
        file.write(b'\xff\xfe\n{"prompt": "also good"}')
    result = run("generate", "--model", model, "--input", source, "--output", target, *SHORT)
    assert result.exit_code == 1
    found = results(target)
    assert [("error" in line) for line in found] == [True] * 13 + [False, True, False]
    assert found[0] == {"line": 1, "input": "not json", "error": found[0]["error"]}
    assert result.stderr.splitlines()[0].startswith("error: line 1: not valid JSON")
    assert result.stderr.splitlines()[-1].startswith("error: 14 of 16 lines failed")
    # A second run has nothing to do, says the same, and changes nothing.
    before = target.read_bytes()
    summary = generate(model, source, target, code=1)
    assert (summary["generated"], summary["skipped"], summary["failed"]) == (0, 16, 14)
    assert target.read_bytes() == before


def test_generate_answers_together_what_it_answers_alone(tmp_path: Path, model: str) -> None:
    """Lines of a batch that cannot be used or are too long leave the others as they are."""
    lines: list[object] = [{"prompt": RAG_PROMPT}, "junk", {"prompt": "why? " * 3000}]
    lines += [{"prompt": "some text " * n} for n in range(1, 6)]
    found = []
    for together in (1, 3, 20):
        source, target = batch(tmp_path, *lines)
        summary = generate(model, source, target, "--batch-size", together, code=1)
        assert (summary["generated"], summary["failed"]) == (6, 2)
        found.append([(line.get("generated"), line.get("error")) for line in results(target)])
        target.unlink()
    assert found[0] == found[1] == found[2]


def test_generate_redoes_a_torn_line(tmp_path: Path, model: str) -> None:
    source, target = batch(tmp_path, *({"id": n, "prompt": f"text {n}"} for n in range(4)))
    generate(model, source, target)
    whole = target.read_bytes()
    second_end = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in (0, 1, second_end - 1, second_end, second_end + 5, len(whole) - 1):
        target.write_bytes(whole[:cut])
        summary = generate(model, source, target)
        assert summary["skipped"] == whole[:cut].count(b"\n")
        assert target.read_bytes() == whole


def test_generate_refuses_another_files_output(tmp_path: Path, model: str) -> None:
    source, target = batch(tmp_path, {"prompt": "a"}, {"prompt": "b"})
    for content in (b'{"prompt": "b"}\n', b"junk\n", b"3\n", b'{"prompt": "a"}\n' * 3, b'{"prompt":"a"}\n\0\0\n'):
        target.write_bytes(content)
        message = refused(2, "generate", "--model", model, "--input", source, "--output", target)
        assert "pass another --output" in message
        assert target.read_bytes() == content


def test_generate_files_that_cannot_be_used(tmp_path: Path, model: str) -> None:
    source, target = batch(tmp_path, {"prompt": "a"})

    def fails(*, read: Path = source, write: Path = target, name: str = model) -> str:
        return refused(2, "generate", "--model", name, "--input", read, "--output", write)

    assert "there is no file" in fails(read=tmp_path / "gone")
    assert "is a directory" in fails(write=tmp_path)
    assert "the same file" in fails(write=source)
    assert "cannot write" in fails(write=tmp_path / "gone" / "out")
    assert "no model directory" in fails(name="./gone")
    assert not target.exists()
    with pytest.raises(InputError, match="cannot read"):
        list(read_lines(tmp_path))


def test_generate_of_an_empty_file_needs_no_model(tmp_path: Path) -> None:
    source, target = batch(tmp_path)
    assert generate("demo", source, target)["generated"] == 0
    assert target.read_bytes() == b""


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n')
    (line,) = read_lines(source)
    assert (line.number, line.fields, line.problem) == (1, {"prompt": "a"}, "")
    file, done, failed = open_output(tmp_path / "out", iter([line]))
    file.close()
    assert (done, failed) == (0, 0)


def test_text_begins_as_the_tokenizer_begins_it(tmp_path: Path, model: str) -> None:
    """A tokenizer that opens every text with a BOS token does so here too, and only once."""
    from tokenizers.processors import TemplateProcessing

    path = tmp_path / "with-bos"
    save_checkpoint(path, ModelCase("llama", "llama"))
    tokenizer = plain_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.save_pretrained(path)
    source, target = batch(tmp_path, {"prompt": "a"}, {"prompt": "<bos>a"})
    generate(str(path), source, target)
    plain, spelled = (line["usage"]["prompt_tokens"] for line in results(target))
    assert plain == 2
    assert spelled > 3, "a control token spelled in text is text"
    target.unlink()
    generate(str(path), source, target, "--allow-special")
    assert [line["usage"]["prompt_tokens"] for line in results(target)] == [2, 2]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, model: str) -> None:
    lines: list[dict[str, Any]] = [{"id": n, "prompt": f"text {n}"} for n in range(3000)]
    lines[5] = {"id": 5, "prompt": ""}
    source, target = batch(tmp_path, *lines)
    command = [sys.executable, "-m", "blockrag", "generate", "--model", model, "--input", source, "--output", target]
    with subprocess.Popen([*map(str, command), *SHORT], env=environment(), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        # Said once the lines before it are done.
        assert process.stderr.readline().startswith(b"error: line 6: ")
        process.kill()
    done = target.read_bytes().count(b"\n")
    assert 6 <= done < 3000
    batch(tmp_path, *lines[: done + 2])
    summary = generate(model, source, target, code=1)
    assert (summary["skipped"], summary["failed"], summary["skipped"] + summary["generated"]) == (done, 1, done + 2)
    assert [line["id"] for line in results(target)] == list(range(done + 2))


# -- demo -------------------------------------------------------------------------------------------------------------


def test_demo_runs_whole_and_reuses_everything_the_second_time(tmp_path: Path, model: str) -> None:
    path = tmp_path / "demo"
    shown = run("demo", "--model", model, "--path", path, "--sample", 6)
    assert shown.exit_code == 0
    assert shown.stderr == ""
    assert "\x1b" not in shown.stdout
    assert max(map(len, shown.stdout.replace(str(path), "DIR").splitlines())) <= 80
    for text in ("parameters", "239 passages", "What is the capital of Bhutan?", "other order", "6 of 358", "Next"):
        assert text in shown.stdout
    result = run_json("demo", "--model", model, "--path", path, "--sample", 2)
    assert (result["ingest"]["documents_unchanged"], result["ingest"]["blocks_new"]) == (239, 0)
    first = result["questions"][0]
    assert first["usage"]["blocks_computed"] == 1, "only the question is computed"
    orders = {run["run"]: [s["title"] for s in run["sources"]] for run in result["questions"][:4]}
    assert orders["block"] == orders["other order"] == orders["full"]
    accuracy = result["accuracy"]
    assert (accuracy["questions"], accuracy["of"], accuracy["passage_found"]) == (2, 358, 2)
    assert len(accuracy["block"]["misses"]) == 2 - accuracy["block"]["right"]
    assert "Everything was there already" in run("demo", "--model", model, "--path", path, "--seconds", 0).stdout
    assert find_settings(path).model == model
    assert torch.get_num_threads() == 1


def test_demo_leaves_other_indexes_alone(index: Path, other_model: str) -> None:
    assert "another index" in refused(2, "demo", "--path", index, "--model", other_model)
    (index / SETTINGS_FILE).unlink()
    assert "another index" in refused(2, "demo", "--path", index, "--model", other_model)


def test_the_embedded_model_answers_its_questions(tmp_path: Path) -> None:
    result = run_json("demo", "--path", tmp_path, "--sample", 10)
    assert sum(question["right"] for question in result["questions"]) >= 0.6 * len(result["questions"])
    assert result["accuracy"]["block"]["right"] >= 8


def test_the_demo_says_how_to_call_the_program_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockrag.cli.demo import _program

    monkeypatch.chdir(tmp_path)
    program = tmp_path / ".venv" / "bin" / "blockrag"
    assert _program(program, None) == ".venv/bin/blockrag"
    assert _program(program, "/usr/bin/blockrag") == ".venv/bin/blockrag"
    assert _program(program, str(program)) == "blockrag"
    assert _program(Path("__main__.py"), None) == "blockrag"
