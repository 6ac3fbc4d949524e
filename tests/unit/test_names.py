"""Resource names, checks of fields and page tokens: what passes, and what is answered by the field's name."""

import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime import names, paging
from services.runtime.errors import InvalidArgument
from services.runtime.fields import FieldChecks, check_request_id
from services.runtime.names import AssignmentId

PARTICIPANT = "0123456789abcdef0123456789abcdef01234567"
SHA256 = "ab" * 32
ASSIGNMENT = AssignmentId(task="digits-1", number=12, round=2, participant=PARTICIPANT)

NAMES: list[tuple[str, Callable[..., Any], Any, str]] = [
    (f"participants/{PARTICIPANT}", names.parse_participant, PARTICIPANT, names.format_participant(PARTICIPANT)),
    ("tasks/digits-1", names.parse_task, "digits-1", names.format_task("digits-1")),
    (
        f"tasks/t/members/{PARTICIPANT}",
        names.parse_member,
        ("t", PARTICIPANT),
        names.format_member("t", PARTICIPANT),
    ),
    ("tasks/t/submissions/7", names.parse_submission, ("t", 7), names.format_submission("t", 7)),
    (
        f"tasks/digits-1/submissions/12/assignments/2-{PARTICIPANT}",
        names.parse_assignment,
        ASSIGNMENT,
        names.format_assignment(ASSIGNMENT),
    ),
    (
        f"tasks/digits-1/submissions/12/evaluations/2-{PARTICIPANT}",
        names.parse_evaluation,
        ASSIGNMENT,
        names.format_evaluation(ASSIGNMENT),
    ),
    (f"artifacts/{SHA256}", names.parse_artifact, SHA256, names.format_artifact(SHA256)),
    (f"stakes/{PARTICIPANT}", names.parse_stake, PARTICIPANT, names.format_stake(PARTICIPANT)),
    ("draws/digits-1-12-2", names.parse_draw, "digits-1-12-2", names.format_draw("digits-1-12-2")),
    ("trainings/abc", names.parse_training, "abc", names.format_training("abc")),
]


@pytest.mark.parametrize(("name", "parse", "parsed", "formatted"), NAMES)
def test_a_name_there_and_back(name: str, parse: Callable[..., Any], parsed: Any, formatted: str) -> None:
    assert parse(name) == parsed
    assert formatted == name


@pytest.mark.parametrize("parse", [row[1] for row in NAMES])
@pytest.mark.parametrize(
    "name", ["", "/", "tasks/", "nonsense", "tasks/t\n", "tasks/T", "artifacts/" + "AB" * 32, "a" * 5000]
)
def test_a_wrong_name_names_the_field(parse: Callable[..., Any], name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(name, "submission.task")
    (violation,) = caught.value.violations
    assert violation.field == "submission.task"
    assert len(violation.description) < 300


@pytest.mark.parametrize("row", NAMES)
@pytest.mark.parametrize("change", ["{}/", "/{}", "{}\n", " {}", "{}/x", "{}%00"])
def test_nothing_before_or_after_a_name(row: tuple[str, Callable[..., Any], Any, str], change: str) -> None:
    name, parse, _, _ = row
    with pytest.raises(InvalidArgument):
        parse(change.format(name))


@pytest.mark.parametrize("number", ["0", "-1", "01", "1.5", "1000000000", "٣", ""])
def test_submissions_count_from_one(number: str) -> None:
    with pytest.raises(InvalidArgument):
        names.parse_submission(f"tasks/t/submissions/{number}")


@pytest.mark.parametrize("task", ["", "a" * 64, "A", "a_b", "ä", "a/b", "a\n"])
def test_a_task_id_is_short_and_plain(task: str) -> None:
    with pytest.raises(InvalidArgument):
        names.parse_task_id(task)
    assert names.parse_task_id("a" * 63) == "a" * 63


def violations(checks: FieldChecks) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        checks.finish()
    return {violation.field: violation.description for violation in caught.value.violations}


def test_all_violations_come_in_one_error() -> None:
    checks = FieldChecks()
    assert not checks.text("display_name", "", max_chars=100)
    assert not checks.range("k", 0, minimum=1, maximum=9)
    assert not checks.digest("digest", b"short")
    assert not checks.require("spec", None)
    assert not checks.count("hidden", [1] * 9, maximum=8)
    assert not checks.one_of("loss", 0, {1, 2})
    assert not checks.one_of("metric", 9, {1, 2})
    assert set(violations(checks)) == {"display_name", "k", "digest", "spec", "hidden", "loss", "metric"}


def test_good_fields_raise_nothing() -> None:
    checks = FieldChecks()
    assert checks.text("display_name", "Zoë's 手書き digits", max_chars=100)
    assert checks.text("note", "", max_chars=100, min_chars=0)
    assert checks.range("k", 3, minimum=1, maximum=9)
    assert checks.digest("digest", bytes(32))
    assert checks.require("spec", object())
    assert checks.count("hidden", [], maximum=8)
    assert checks.one_of("loss", 2, {1, 2})
    checks.finish()


@pytest.mark.parametrize(
    "text", ["", " ", "\t", "a\nb", "a\0b", "\x1b[31mred", "\u202eevil", "a\u2028b", "x" * 101, "\ud800"]
)
def test_a_text_that_is_no_name(text: str) -> None:
    checks = FieldChecks()
    checks.text("display_name", text, max_chars=100)
    assert "display_name" in violations(checks)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.1, 1.1])
def test_a_number_outside(value: float) -> None:
    checks = FieldChecks()
    checks.range("dropout", value, minimum=0, maximum=1)
    assert "dropout" in violations(checks)


def test_a_request_id_is_short_and_printable() -> None:
    for good in ("", "a", "x" * 64, "0b0f-~ "):
        check_request_id(good)
    for bad in ("x" * 65, "a\n", "é"):
        with pytest.raises(InvalidArgument, match="request_id"):
            check_request_id(bad)


TOKENS = paging.PageTokens(bytes(32))


@given(st.text(max_size=50), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50))
def test_a_page_token_there_and_back(query: str, cursor: str) -> None:
    query = query.encode("utf-8", "replace").decode()
    assert TOKENS.decode(TOKENS.encode(query, cursor), query) == cursor


def test_the_first_and_the_last_page_have_no_token() -> None:
    assert TOKENS.decode("", "list") == ""
    assert TOKENS.encode("list", "") == ""


@pytest.mark.parametrize(
    "token",
    [
        TOKENS.encode("ListTasks|tasks/b", "5"),
        paging.PageTokens(b"x" * 32).encode("ListTasks|tasks/a", "5"),
        TOKENS.encode("ListTasks|tasks/", "a5"),
        TOKENS.encode("ListTasks|tasks/a", "5")[:-2],
        "A" + TOKENS.encode("ListTasks|tasks/a", "5")[1:],
        "5",
        "nonsense",
        "%%%",
        "ä",
        "A" * 3000,
    ],
)
def test_a_forged_token_or_one_of_another_list_names_page_token(token: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        TOKENS.decode(token, "ListTasks|tasks/a")
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


@pytest.mark.parametrize(("requested", "given"), [(0, 50), (1, 1), (1000, 1000), (5000, 1000)])
def test_page_size(requested: int, given: int) -> None:
    assert paging.page_size(requested) == given


def test_a_negative_page_size_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="page_size"):
        paging.page_size(-1)


def test_starts_at_once_agree_on_one_private_secret(tmp_path: Path) -> None:
    path = tmp_path / "state" / "pages"
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: paging.load_secret(path), range(8)))
    assert secrets == {path.read_bytes()}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="pages"):
        paging.load_secret(path)
