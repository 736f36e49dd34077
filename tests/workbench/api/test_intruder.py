"""The intruder's list, sent byte for byte to a true server, and what is not a request of its own."""

from __future__ import annotations

import csv
import json
import socket
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # intruder_table

from intruder_table import DOCUMENT, HOST, Try, table, tries

from workbench import settings as settings_module
from workbench.host import fake_worker
from workbench.runs.notebooks import UnknownNotebookError, find

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def bare(serve):
    with serve(partial(fake_worker, delay_s=0.0), max_body_bytes=LIMIT) as running:
        yield running


def send(url: str, request: bytes) -> tuple[int, bytes, bytes]:
    """Status, head and body of the answer; status 0 where there was none."""
    address = url.removeprefix("http://")
    with socket.create_connection(address.split(":"), timeout=30) as connection:
        try:
            connection.sendall(request.replace(HOST.encode(), address.encode()))
        except ConnectionError:
            pass  # refused before all of it was read
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, head, body


def marked(each: Try):
    """Patterns are compiled in a process of their own, which takes seconds to start."""
    marks = [pytest.mark.full] if "pattern" in each.name else []
    return pytest.param(each, id=f"{each.group}: {each.name}", marks=marks)


@pytest.mark.parametrize("each", [marked(each) for each in tries(LIMIT)])
def test_what_is_tried_is_answered_as_the_document_says(bare, each: Try):
    status, _, body = send(bare.url, each.request)
    assert status == each.status, body[:500]
    assert b"Traceback" not in body
    assert b"root:" not in body
    if each.code:
        assert json.loads(body)["error"]["code"] == each.code
    assert bare.http.get("/readyz").status_code == 200  # and nobody else noticed


def test_the_document_has_the_table():
    assert table() in DOCUMENT.read_text("utf-8"), "run `python -m tests.workbench.api.intruder_table`"


HOSTILE = (
    "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %} ${7*7} <%= 7*7 %>"
)


@pytest.mark.full
def test_a_users_text_is_never_a_template(tiny_model):
    from engine.errors import InvalidRequestError
    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(tiny_model)
    roles = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]
    ids = tokenizer.apply_chat_template(roles, chat_template_kwargs={"enable_thinking": HOSTILE})
    assert tokenizer.decode(ids).count(HOSTILE) == 2
    for name in ("messages", "chat_template", "tools"):
        with pytest.raises(InvalidRequestError, match=name):
            tokenizer.apply_chat_template(roles, chat_template_kwargs={name: HOSTILE})


@pytest.mark.full
@pytest.mark.parametrize(
    "value", ['"\nimport os\nos.abort()\n"', "'''\"\"\"\\", "__import__('os').abort()", "\\\r\n#", "{{ 1 }}"]
)
def test_a_notebooks_parameter_is_a_value_and_not_code(value: str):
    import ast

    from papermill.translators import PythonTranslator

    (assignment,) = ast.parse(PythonTranslator.codify({"text": value})).body
    assert ast.literal_eval(assignment.value) == value


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..%2f..", "overview\x00", "", "."])
def test_a_notebook_is_found_by_its_name_alone(name: str, tmp_path: Path):
    with pytest.raises(UnknownNotebookError):
        find(name, settings_module.load(home_dir=tmp_path))


def test_what_a_notebook_has_written_is_text_on_a_page():
    from workbench.ui import executed_notebook, markup

    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    cells = [executed_notebook.Cell("code", hostile, (executed_notebook.Output("text", hostile),))]
    assert "<script" not in executed_notebook.as_html(cells)
    assert "<img" not in executed_notebook.as_html(cells)
    assert markup.text('" onmouseover="x') == "&quot; onmouseover=&quot;x"


def test_a_table_that_is_downloaded_holds_no_formula():
    import pandas as pd

    from workbench.ui.benchmark_result import csv_of

    named = ['=HYPERLINK("http://evil.example")', "+1", "-1+2", "@SUM(A1)", "\t=1", "plain", None]
    told = csv_of(pd.DataFrame({"request_id": named, "ttft_ms": -1.5})).decode()
    rows = list(csv.reader(told.splitlines()))[1:]
    assert [row[0] for row in rows] == ["'" + name for name in named[:5]] + ["plain", ""]
    assert {row[1] for row in rows} == {"-1.5"}
