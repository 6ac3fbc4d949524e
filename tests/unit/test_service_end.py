"""How a process of a service ends that cannot go on, and what it says where nobody is there to raise an error to."""

import json
import logging
import subprocess
import sys
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


_UNHEARD = """
import threading, warnings
from services.runtime.telemetry import configure_telemetry

class Last:
    def __del__(self):
        raise ValueError("at the end of an object")

def work():
    raise ValueError("in a thread")

configure_telemetry("sample", format="json")
thread = threading.Thread(target=work, name="worker")
thread.start()
thread.join()
Last()
warnings.warn("soon no more")
"""


def test_what_nobody_can_catch_is_a_line_of_the_log() -> None:
    ended = subprocess.run([sys.executable, "-c", _UNHEARD], capture_output=True, text=True, timeout=60, check=True)
    thread, unraisable, warning = map(json.loads, ended.stderr.splitlines())
    assert (thread["level"], thread["thread"], thread["service"]) == ("error", "worker", "sample")
    assert "ValueError: in a thread" in thread["exception"]
    assert "Last.__del__" in unraisable["where"]
    assert "ValueError: at the end of an object" in unraisable["exception"]
    assert (warning["level"], "soon no more" in warning["event"]) == ("warning", True)
