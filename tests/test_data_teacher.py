"""Responses by a model: in this process, and behind a server that runs; interrupted, refused, unreachable."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from live_server import Live, live_server

from blockrag.errors import DataError, InputError
from blockrag.finetune.data.lines import Candidate, Question, RagLine, read_rag_lines, write_lines
from blockrag.finetune.data.ranking import split_questions
from blockrag.finetune.data.teacher import AnswerReport, ModelTeacher, ServedTeacher, answer_file, rag_messages
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.passage import Passage

CAPITALS = {"Bhutan": "Thimphu", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo"}
PASSAGES = tuple(Candidate(Passage(c, f"The capital of {c} is {t}.", c), score=0.1) for c, t in CAPITALS.items())
SHORT = GenerationOptions(max_new_tokens=12)


def line(*countries: str, answers: tuple[str, ...] = (), **fields: Any) -> RagLine:
    questions = (Question(f"What is the capital of {c}?", answers or (CAPITALS[c],), id=c) for c in countries)
    return RagLine(PASSAGES, tuple(questions), **fields)


TOO_LONG = RagLine((Candidate(Passage("1", "word " * 5000)),), (Question("What?", ("word",)),))


@pytest.fixture(scope="module")
def model() -> BlockModel:
    return BlockModel.from_pretrained("demo")


@pytest.fixture(scope="module")
def live(model: BlockModel) -> Iterator[Live]:
    with live_server(model, max_queue=64) as running:
        yield running


def responses_of(path: Path) -> list[tuple[str, str]]:
    return [(asked.id, asked.response) for _, one in read_rag_lines(path) for asked in one.questions]


def test_a_model_answers_in_its_own_template(tmp_path: Path, model: BlockModel) -> None:
    lines = [line("Bhutan", "Kenya", id="two"), line("Peru")]
    write_lines(tmp_path / "in", lines)
    report = answer_file(tmp_path / "in", tmp_path / "out", ModelTeacher(model, SHORT, batch_size=2))
    answered = [one for _, one in read_rag_lines(tmp_path / "out")]
    assert responses_of(tmp_path / "out") == [("Bhutan", "Thimphu"), ("Kenya", "Nairobi"), ("Peru", "Lima")]
    # All else stays as it was.
    bare = [dataclasses.replace(q, response="") for one in answered for q in one.questions]
    assert bare == [q for one in lines for q in one.questions]
    assert [(one.passages, one.id) for one in answered] == [(one.passages, one.id) for one in lines]
    assert report == AnswerReport(responses=3, with_answer=3)


def test_full_attention_sees_the_same_prompt(model: BlockModel) -> None:
    (alone,) = ModelTeacher(model, SHORT, attention="full").respond([line("Norway")])
    prompt = model.template.segment(
        model.tokenizer, passages=[one.passage for one in PASSAGES], question="What is the capital of Norway?"
    )
    assert alone == model.generate(prompt, SHORT, attention="full").text.strip()


@pytest.mark.parametrize(
    ("policy", "responses", "report"),
    [
        (
            "keep",
            [("Bhutan", "Thimphu"), ("Kenya", "Nairobi")],
            AnswerReport(responses=2, with_answer=1, dropped=1, without_response=1),
        ),
        (
            "gold",
            [("Bhutan", "Thimphu"), ("Kenya", ""), ("", "")],
            AnswerReport(responses=1, with_answer=1, replaced=2, without_response=1),
        ),
        ("drop", [("Bhutan", "Thimphu")], AnswerReport(responses=1, with_answer=1, dropped=2, without_response=1)),
    ],
)
def test_responses_without_an_answer(
    tmp_path: Path, model: BlockModel, policy: Any, responses: list[tuple[str, str]], report: AnswerReport
) -> None:
    asked = line("Bhutan", "Kenya")
    wrong = dataclasses.replace(asked.questions[1], answers=("Mombasa",))
    lines = [dataclasses.replace(asked, questions=(asked.questions[0], wrong)), TOO_LONG]
    write_lines(tmp_path / "in", lines)
    teacher = ModelTeacher(model, SHORT)
    assert answer_file(tmp_path / "in", tmp_path / "out", teacher, without_answer=policy) == report
    assert responses_of(tmp_path / "out") == responses
    targets = [asked.target for _, one in read_rag_lines(tmp_path / "out") for asked in one.questions]
    assert targets[:2] == (["Thimphu", "Mombasa"] if policy == "gold" else [text for _, text in responses])
    # Nothing is asked again where something was dropped.
    written = (tmp_path / "out").read_bytes()
    again = answer_file(tmp_path / "in", tmp_path / "out", teacher, without_answer=policy)
    assert again.lines_before == len(list(read_rag_lines(tmp_path / "out")))
    assert (again.responses, (tmp_path / "out").read_bytes()) == (0, written)


def test_a_killed_run_goes_on_behind_its_last_whole_line(tmp_path: Path, model: BlockModel) -> None:
    write_lines(tmp_path / "in", [line(country) for country in [*CAPITALS, *CAPITALS]])
    teacher = ModelTeacher(model, SHORT)
    answer_file(tmp_path / "in", tmp_path / "out", teacher)
    whole = (tmp_path / "out").read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for end, done in [(ends[2], 3), (ends[2] + 40, 3), (ends[0] - 1, 0), (0, 0)]:
        (tmp_path / "out").write_bytes(whole[:end])
        report = answer_file(tmp_path / "in", tmp_path / "out", teacher)
        assert (tmp_path / "out").read_bytes() == whole
        assert (report.lines_before, report.responses) == (done, 8 - done)


def test_it_goes_on_in_no_other_file(tmp_path: Path, model: BlockModel) -> None:
    write_lines(tmp_path / "in", [line("Bhutan"), line("Kenya")])
    teacher = ModelTeacher(model, SHORT)
    for other in ([line("Peru")], [line("Kenya"), line("Bhutan")], [line("Bhutan", answers=("x",))]):
        write_lines(tmp_path / "out", other)
        before = (tmp_path / "out").read_bytes()
        with pytest.raises(DataError, match=r"out, line \d: does not answer what the source asks there"):
            answer_file(tmp_path / "in", tmp_path / "out", teacher)
        assert (tmp_path / "out").read_bytes() == before
    # Without a line end, as json.dump leaves it, a file looks like one that was cut off.
    for foreign in (b'{"results": [1, 2, 3]}', b'{"passages": [{"id": "1", "title": "", "text": "x"}], "question'):
        (tmp_path / "out").write_bytes(foreign)
        with pytest.raises(DataError, match=r"out, line 1: does not answer what the source asks there"):
            answer_file(tmp_path / "in", tmp_path / "out", teacher)
        assert (tmp_path / "out").read_bytes() == foreign
    with pytest.raises(InputError, match="would overwrite"):
        answer_file(tmp_path / "in", tmp_path / "in", teacher)
    with pytest.raises(DataError, match="cannot write"):
        answer_file(tmp_path / "in", tmp_path, teacher)


def test_a_run_without_results_leaves_nothing(tmp_path: Path, model: BlockModel) -> None:
    write_lines(tmp_path / "in", [TOO_LONG])
    with pytest.raises(DataError, match="every question was dropped"):
        answer_file(tmp_path / "in", tmp_path / "out", ModelTeacher(model, SHORT))
    (tmp_path / "bad").write_text("{}\n")
    with pytest.raises(DataError, match="bad, line 1"):
        answer_file(tmp_path / "bad", tmp_path / "out", ModelTeacher(model, SHORT))
    assert not (tmp_path / "out").exists()


def test_the_teacher_reads_no_further_ahead_than_it_works(tmp_path: Path, model: BlockModel) -> None:
    lines = [line("Bhutan"), line("Kenya")]
    write_lines(tmp_path / "in", lines)
    with (tmp_path / "in").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(DataError, match="in, line 3: not valid JSON"):
        answer_file(tmp_path / "in", tmp_path / "out", ModelTeacher(model, SHORT, batch_size=2))
    assert responses_of(tmp_path / "out") == [("Bhutan", "Thimphu"), ("Kenya", "Nairobi")]


# -- behind a server --------------------------------------------------------------------------------------------------


def test_the_prompt_as_messages() -> None:
    asked = RagLine(
        (Candidate(Passage("1", " Text {question}.\n", "Title {text}")), Candidate(Passage("2", "More."))),
        (Question(" Why {title}? ", ("x",)),),
    )
    system, user = rag_messages(asked)
    assert (system["role"], user["role"]) == ("system", "user")
    assert system["content"] == (
        "You are an intelligent AI assistant. Please answer questions based on the user's instructions. "
        "Below are some reference documents that may help you in answering the user's question."
    )
    assert user["content"] == (
        "- Title: Title {text}\nText {question}.\n- More.\n\n"
        "Please write a high-quality answer for the given question using only the provided search documents "
        "(some of which might be irrelevant).\nQuestion: Why {title}?"
    )


def served(live: Live, **arguments: Any) -> ServedTeacher:
    return ServedTeacher(f"{live.url}/v1", "demo", max_tokens=12, max_retries=0, **arguments)


def test_a_server_is_asked_many_things_at_once_and_answers_stay_in_order(tmp_path: Path, live: Live) -> None:
    lines = [line(country, id=f"{number}") for number in range(4) for country in CAPITALS]
    write_lines(tmp_path / "in", lines)
    teacher = served(live, concurrency=5, seed=1)
    report = answer_file(tmp_path / "in", tmp_path / "out", teacher)
    teacher.close()
    assert report.responses == 16
    client = live.client()
    expected = {}
    for one in lines[:4]:
        completion = client.chat.completions.create(model="demo", messages=rag_messages(one), max_tokens=12)  # type: ignore[arg-type]
        expected[one.questions[0].id] = (completion.choices[0].message.content or "").strip()
    assert len(set(expected.values())) > 1
    assert responses_of(tmp_path / "out") == [(one.questions[0].id, expected[one.questions[0].id]) for one in lines]


def test_a_request_the_server_refuses_is_no_response(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    teacher = served(live)
    refused, answered, again = teacher.respond([TOO_LONG, line("Peru"), TOO_LONG])
    assert refused == again == ""
    assert answered != ""
    teacher.close()
    # Why is said once: it may be the same for all of thousands.
    (said,) = [record.getMessage() for record in caplog.records if record.name == "blockrag.finetune.data.teacher"]
    assert said.startswith("the teacher 'demo' refuses 'What?': Error code: 400")


class Elsewhere(BaseHTTPRequestHandler):
    """Answers every request with what stands in its path."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        kind, body = unquote(self.path).removeprefix("/").removesuffix("/chat/completions").split(":", 1)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("text/html:<p>log in", "answers with no chat completion: <p>log in; check the address"),
        ("application/json:[]", "answers with no chat completion"),
        ('application/json:{"error": "no quota"}', "answers with no chat completion: .+no quota"),
        ('application/json:{"id"', "answers with broken JSON"),
    ],
)
def test_an_address_of_something_else_is_no_empty_response(elsewhere: str, reply: str, problem: str) -> None:
    teacher = ServedTeacher(f"{elsewhere}/{quote(reply, safe=':')}", "demo", max_retries=0)
    with pytest.raises(InputError, match=problem):
        list(teacher.respond([line("Peru")]))
    teacher.close()


@pytest.mark.parametrize("choices", ["[]", '[{"index": 0, "message": null}]', '[{"message": {"content": null}}]'])
def test_what_a_filter_swallowed_is_an_empty_response(elsewhere: str, choices: str) -> None:
    reply = f'application/json:{{"id": "1", "object": "chat.completion", "choices": {choices}}}'
    teacher = ServedTeacher(f"{elsewhere}/{quote(reply, safe=':')}", "demo", max_retries=0)
    assert list(teacher.respond([line("Peru")])) == [""]
    teacher.close()


def test_without_the_client_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from blockrag.errors import MissingDependencyError\n"
        "from blockrag.finetune.data.teacher import ServedTeacher\n"
        "try: ServedTeacher('http://127.0.0.1:9/v1', 'demo')\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'blockrag[data]'" in printed


def test_requests_run_no_further_ahead_than_twice_their_number(live: Live) -> None:
    taken: list[str] = []

    def lines() -> Iterable[RagLine]:
        for number in range(50):
            taken.append(str(number))
            yield from split_questions(line("Peru"))

    teacher = served(live, concurrency=2)
    responses = teacher.respond(lines())
    next(responses)
    assert len(taken) == 4
    responses.close()  # type: ignore[attr-defined]
    teacher.close()


def test_a_server_that_is_gone_ends_the_run_which_goes_on_later(tmp_path: Path, model: BlockModel) -> None:
    write_lines(tmp_path / "in", [line(country) for country in CAPITALS])
    with live_server(model) as live:
        teacher = served(live, concurrency=1)

        def stop_after_one(report: AnswerReport) -> None:
            live.stop()

        # A request that is under way while it stops is answered with 503, a later one by nobody.
        gone = r"does not answer \((APIConnectionError|InternalServerError.+503).+run the same command again"
        with pytest.raises(InputError, match=gone):
            answer_file(tmp_path / "in", tmp_path / "out", teacher, progress=stop_after_one)
        teacher.close()
    first = (tmp_path / "out").read_bytes()
    done = first.count(b"\n")
    assert 1 <= done < 4
    with live_server(model) as live:
        teacher = served(live)
        report = answer_file(tmp_path / "in", tmp_path / "out", teacher)
        teacher.close()
    assert (report.lines_before, report.responses) == (done, 4 - done)
    assert (tmp_path / "out").read_bytes().startswith(first)


def test_a_wrong_key_is_no_empty_response(tmp_path: Path, model: BlockModel) -> None:
    write_lines(tmp_path / "in", [line("Peru")])
    with live_server(model, api_key="secret") as live:
        teacher = served(live, api_key="guess")
        with pytest.raises(InputError, match="AuthenticationError"):
            answer_file(tmp_path / "in", tmp_path / "out", teacher)
        teacher.close()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="concurrency must be at least 1"):
        ServedTeacher("http://127.0.0.1:9/v1", "demo", concurrency=0)
    for key in ("clé", "two\nlines"):
        with pytest.raises(InputError, match="the key holds characters that no request can carry"):
            ServedTeacher("http://127.0.0.1:9/v1", "demo", api_key=key)
