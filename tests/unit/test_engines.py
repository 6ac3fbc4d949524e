"""Connections to PostgreSQL do not wait for ever."""

from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from services.runtime.engines import postgres_engine, reading_engine, writing_engine


class Asked(Exception):
    """Raised in place of a connection, with what it was asked for."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters


def _parameters(engine: Engine) -> dict[str, Any]:
    @event.listens_for(engine, "do_connect")
    def ask(_dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
        raise Asked(parameters)

    with pytest.raises(Asked) as asked:
        engine.connect()
    return asked.value.parameters


def test_every_connection_finds_out_that_its_server_is_gone() -> None:
    url = "postgresql+psycopg://selector@database/selector"
    for engine in (writing_engine(url), reading_engine(url, readers=2), postgres_engine(url)):
        asked = _parameters(engine)
        assert asked["connect_timeout"] == 10
        idle_s = asked["keepalives_idle"] + asked["keepalives_count"] * asked["keepalives_interval"]
        assert max(idle_s, asked["tcp_user_timeout"] / 1000) <= 30


def test_the_url_has_the_last_word() -> None:
    asked = _parameters(postgres_engine("postgresql+psycopg://selector@database/selector?connect_timeout=60"))
    assert asked["connect_timeout"] == "60"
    assert asked["keepalives_count"] == 3
