"""Answers to requests with an id, stored with the changes they answer: found and written a whole group at a time."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from sqlalchemy import Column, LargeBinary
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, SQLModel

from services.runtime.engines import found_rows, placeholder
from services.runtime.idempotency import PendingRequest, check_body

Key = tuple[str, str, str]
_COLUMNS = ("sub", "method", "request_id", "body_sha256", "answer", "remembered_at_s")


class RememberedRequest(SQLModel, table=True):
    """The answer to one request id of one caller, stored with the change it answers."""

    __tablename__ = "remembered_requests"

    sub: str = Field(primary_key=True)
    method: str = Field(primary_key=True)
    request_id: str = Field(primary_key=True)
    body_sha256: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    answer: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    remembered_at_s: int = Field(index=True)


def create_remembered_requests(op: Any) -> None:
    """Creates the table of RememberedRequest; a service's first migration calls this with Alembic's `op`."""
    import sqlalchemy as sa

    op.create_table(
        "remembered_requests",
        sa.Column("sub", sa.String, primary_key=True),
        sa.Column("method", sa.String, primary_key=True),
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("body_sha256", sa.LargeBinary, nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("remembered_at_s", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_remembered_requests_remembered_at_s", "remembered_requests", ["remembered_at_s"])


class AnsweredMeanwhile(Exception):
    """A request's key is taken. Who took it after this transaction's snapshot is seen by the next attempt only."""


class Answers:
    """What is remembered for the requests of one group, and what the group adds. `write` puts it into the database."""

    def __init__(self, connection: Connection, requests: Iterable[PendingRequest]) -> None:
        self._connection = connection
        self._known = _stored(connection, {_key(request) for request in requests})
        self._new: list[tuple[str, str, str, bytes, bytes, int]] = []

    def find(self, request: PendingRequest) -> bytes | None:
        """The answer stored under this request's key. Raises AlreadyExists where it was stored for another body."""
        known = self._known.get(_key(request))
        if known is None:
            return None
        check_body(request, known[0])
        return known[1]

    def add(self, request: PendingRequest, answer: bytes, *, now_s: int) -> None:
        """Remember an answer from the end of this group on."""
        key = _key(request)
        self._known[key] = (request.body_sha256, answer)
        self._new.append((*key, request.body_sha256, answer, now_s))

    def write(self) -> None:
        """Raises AnsweredMeanwhile where another process has stored an answer under one of the keys."""
        if not self._new:
            return
        try:
            self._connection.exec_driver_sql(_insert(placeholder(self._connection)), self._new)
        except IntegrityError as taken:
            raise AnsweredMeanwhile from taken


def find_answer(connection: Connection, request: PendingRequest) -> bytes | None:
    """The answer stored under this request's key. Raises AlreadyExists where it was stored for another body."""
    return Answers(connection, [request]).find(request)


def _key(request: PendingRequest) -> Key:
    return request.sub, request.method, request.request_id


def _stored(connection: Connection, keys: set[Key]) -> dict[Key, tuple[bytes, bytes]]:
    if not keys:
        return {}
    asked = _select(placeholder(connection), len(keys))
    found = found_rows(connection, asked, [part for key in keys for part in key])
    return {(sub, method, request_id): (body, answer) for sub, method, request_id, body, answer in found}


@cache
def _select(mark: str, count: int) -> str:
    any_of = " OR ".join([f"(sub = {mark} AND method = {mark} AND request_id = {mark})"] * count)
    return f"SELECT sub, method, request_id, body_sha256, answer FROM remembered_requests WHERE {any_of}"  # noqa: S608 - placeholders alone


@cache
def _insert(mark: str) -> str:
    marks = ", ".join([mark] * len(_COLUMNS))
    return f"INSERT INTO remembered_requests ({', '.join(_COLUMNS)}) VALUES ({marks})"  # noqa: S608 - placeholders alone
