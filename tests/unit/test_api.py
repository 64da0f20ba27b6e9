# SPDX-License-Identifier: MIT
"""docs/control.md and the models of the control socket say the same."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sockmi import api
from sockmi.refusal import Code, Refusal

ID = b"7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01"

SPEC = (Path(__file__).parents[2] / "docs" / "control.md").read_text()
EXAMPLES = re.findall(r"^```json (request|response) ?(\w*)\n(.*?)^```", SPEC, re.S | re.M)


def _lines(what: str) -> list[tuple[str, str]]:
    return [(op, line) for kind, op, body in EXAMPLES if kind == what for line in body.splitlines()]


@pytest.mark.parametrize("line", [line for _unused, line in _lines("request")])
def test_request_examples_validate(line: str) -> None:
    request = api.parse_request(line.encode())
    again = api.parse_request(api.line_of(request))
    assert again == request
    assert set(json.loads(line)) <= set(type(request).model_fields)


@pytest.mark.parametrize(("op", "line"), _lines("response"))
def test_response_examples_validate(op: str, line: str) -> None:
    model = api.ErrorResponse if op == "error" else api.RESPONSES[op]
    parsed = model.model_validate_json(line)
    assert model.model_validate_json(api.line_of(parsed)) == parsed


def test_every_op_has_examples_and_a_section() -> None:
    asked = {json.loads(line)["op"] for _unused, line in _lines("request")}
    assert asked == set(api.RESPONSES)
    assert {op for op, _unused in _lines("response")} == asked | {"error"}
    for op in set(api.RESPONSES) - {"taken"}:
        assert f"\n### {op}\n" in SPEC


def test_every_field_is_documented() -> None:
    models: list[type[BaseModel]] = [
        *(type(api.parse_request(line.encode())) for _unused, line in _lines("request")),
        *api.RESPONSES.values(),
        api.MigrationRecord,
        api.ImportCriteria,
        api.SocketFilter,
        api.SocketRow,
    ]
    for model in models:
        for name, field in model.model_fields.items():
            assert re.search(rf"[`\"]{field.alias or name}[`\"]", SPEC), f"{model.__name__}.{name}"


def test_errno_table_is_whole() -> None:
    assert set(api.ERRNO) == set(Code)
    assert all(hasattr(errno, name) for name in api.ERRNO.values())
    table = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (E[A-Z]+) \|$", SPEC, re.M))
    assert table == {str(code): name for code, name in api.ERRNO.items()}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b'{"op":"nonsense"}', "nonsense"),
        (b'{"op":"status","colour":1}', "colour"),
        (b'{"op":"status","id":1.5}', "id"),
        (b'{"op":"export","sockets":[]}', "sockets"),
        (b'{"op":"export","sockets":[{"pid":1}]}', "needs pid and fd"),
        (b'{"op":"export","sockets":[{"pid":0,"fd":1}]}', "sockets.0.pid"),
        (b'{"op":"export","sockets":[{"pid":1,"fd":-1}]}', "sockets.0.fd"),
        (b'{"op":"export","sockets":[{"descriptor":true}]}', "need 1 descriptors, but fds is 0"),
        (b'{"op":"export","sockets":[{"pid":1,"fd":1}],"timeout_s":-1}', "timeout_s"),
        (b'{"op":"export","sockets":[{"pid":1,"fd":1,"migration_id":"x"}]}', "migration_id"),
        (b'{"op":"export","sockets":[{"pid":1,"fd":1}],"fds":254}', "fds"),
        (b'{"op":"export","sockets":[{"listed":"%s","fd":1}]}' % ID, "listed"),
        (b'{"op":"export","sockets":[{"listed":"%s","context":true}],"fds":1}' % ID, "listed"),
        (b'{"op":"import","requests":[]}', "requests"),
        (b'{"op":"import","requests":[{"states":[]}]}', "states"),
        (b'{"op":"import","requests":[{"states":["bound"],"preferred":["connected"]}]}', "preferred"),
        (b'{"op":"import","requests":[{"states":["bound"],"remote_port":1}]}', "remote"),
        (b'{"op":"import","requests":[{"states":["bound"],"local_port":65536}]}', "local_port"),
        (b'{"op":"import","requests":[{"states":["bound"],"local_address":"here"}]}', "local_address"),
        (b'{"op":"import","requests":[{"states":["bound"]}],"timeout_ms":-2}', "timeout_ms"),
        (b'{"op":"groups","action":"join","name":"x"}', "key_file"),
        (b'{"op":"groups","action":"leave"}', "name"),
        (b'{"op":"groups","action":"join","name":"x","key_file":"k","address":"10.0.0.1"}', "multicast"),
        (b'{"op":"groups","action":"join","name":"x","key_file":"k"}', "either"),
        (b'{"op":"list","table":"chairs"}', "table"),
        (b'{"op":"history","since":"yesterday"}', "since"),
        (b'{"op":"status"}' + b" " * api.LINE_BYTES_MAX, "longer than"),
    ],
)
def test_bad_requests_name_the_field(line: bytes, named: str) -> None:
    with pytest.raises(Refusal) as caught:
        api.parse_request(line)
    assert caught.value.code is Code.BAD_REQUEST
    assert named in caught.value.message


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=9)
        | st.sampled_from(sorted(api.RESPONSES)),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["op", "sockets", "pid", "fd", "requests", "states", "id"]), inner
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_line_raises_anything_but_a_refusal(line: bytes) -> None:
    try:
        assert api.parse_request(line).op in api.RESPONSES
    except Refusal as refusal:
        assert refusal.code is Code.BAD_REQUEST
    assert api.request_id(line) is None or isinstance(api.request_id(line), (str, int))


def test_an_error_repeats_the_id_of_a_bad_request() -> None:
    assert api.request_id(b'{"op":"nonsense","id":"x"}') == "x"
    line = json.loads(api.error_line(Refusal(Code.ULP, "why"), "x"))
    assert line == {"id": "x", "ok": False, "error": {"code": "ulp", "message": "why", "errno": "ENOTSUP"}}


def test_a_line_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="several lines"):
        api.line_of(api.ReloadResponse(changed=["x" * 100] * 11_000, restart_needed=[]))
