"""How a process of a service ends that cannot go on."""

import logging
from collections.abc import Iterator

import pytest
import structlog
from sqlalchemy.exc import OperationalError

from services.runtime.server import run
from services.runtime.telemetry import LogFormat, configure_logging


@pytest.fixture(autouse=True)
def _logs_go_on_as_before() -> Iterator[None]:
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.configure(**before)


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("state/key.pem may be read\nby others"), "ValueError: state/key.pem may be read by others"),
        (OperationalError("SELECT 1", {}, OSError("connection refused")), "OSError: connection refused"),
    ],
)
def test_the_last_line_says_what_was_at_fault(
    capsys: pytest.CaptureFixture[str], format: LogFormat, error: Exception, line: str
) -> None:
    async def main() -> None:
        raise error

    configure_logging("sample", format=format)
    with pytest.raises(SystemExit) as ended:
        run(main())
    assert ended.value.code == 1
    out, said = capsys.readouterr()
    assert out == ""
    assert "ended by an error" in said
    assert "Traceback" in said
    assert said.splitlines()[-1] == line
