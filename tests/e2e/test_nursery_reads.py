"""What a model server that strangers' weights have taken over reads: Python and its own folder, and no secret."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from services.modelserver import reading
from services.modelserver.reading import library_around
from services.modelserver.spawn import ChildEnded, ExitKind, Limits, Nursery
from services.validator.bootstrap import build
from services.validator.settings import ValidatorSettings
from tiltyard.modelspec import ModelFault

PATIENCE_S = 120  # on a busy machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the nursery stands on Linux's process controls")

TAKEN_OVER = """#!{python}
# A zygote whose children, once they are confined, report which of the files named in their folder they can read.
import sys
sys.path.insert(0, {sources!r})
import json
from pathlib import Path
from services.modelserver import child, nursery

def serve(order, cores, report):
    read = []
    for path in json.loads(Path("wanted").read_text()):
        try:
            with open(path, "rb") as file:
                file.read(1)
            read.append(path)
        except PermissionError:
            pass
    child._say(report, {{"event": "fault", "code": "BAD_FORMAT", "detail": json.dumps(read)}})
    return child.EXIT_FAULT

child._serve = serve
{more}
nursery.main()
"""


async def read_by_a_child(state: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> tuple[Nursery, list[str]]:
    """A closed nursery, and what a child of it read: of two secrets, this process, Python, and the child's own."""
    folder = state / "children" / "one"
    folder.mkdir(parents=True)
    (state / "cache").mkdir()
    secrets = [state / "key.pem", state / "cache" / "dataset"]
    for secret in secrets:
        secret.write_text("kept to itself")
    others = [f"/proc/{os.getpid()}/{name}" for name in ("environ", "mem")]
    wanted = [*map(str, secrets), *others, "/etc/passwd", os.__file__, reading.__file__, "wanted"]
    (folder / "wanted").write_text(json.dumps(wanted))
    python = state / "python"
    python.write_text(TAKEN_OVER.format(python=sys.executable, sources=str(Path.cwd()), more=more))
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    async with asyncio.timeout(PATIENCE_S), Nursery() as nursery:
        with pytest.raises(ModelFault) as caught:
            await nursery.spawn(folder, Limits(memory_bytes=1 << 30, cpu_seconds=60))
    return nursery, json.loads(caught.value.detail)


async def test_a_child_reads_no_key_and_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in the image, whose working directory holds the state.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    nursery, read = await read_by_a_child(tmp_path, monkeypatch)
    assert nursery.confinement is not None
    if not nursery.confinement.files:
        pytest.skip("this kernel has no Landlock")
    assert nursery.confinement.reads
    assert read == [os.__file__, reading.__file__, "wanted"]


async def test_where_a_model_would_fail_by_it_all_is_read_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # As where Python's packages are links to some other place.
    missing = f"child.rehearse = lambda: open({str(tmp_path / 'key.pem')!r})"
    nursery, read = await read_by_a_child(tmp_path, monkeypatch, missing)
    assert nursery.confinement is not None
    if not nursery.confinement.files:
        pytest.skip("this kernel has no Landlock")
    assert not nursery.confinement.reads
    assert "able to read those of its user" in str(nursery.confinement)
    assert str(tmp_path / "key.pem") in read
    assert "a rehearsal failed: PermissionError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        ("replace(whole(*given), files=False)", "able to change files"),
        ("os.open('/nowhere', os.O_RDONLY)", "No such file or directory: '/nowhere'"),
    ],
    ids=["lets", "fails"],
)
async def test_a_child_that_is_not_confined_as_the_rehearsal_was_serves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, told: str
) -> None:
    otherwise = f"""
import os
from dataclasses import replace
from services.modelserver import sandbox
whole = sandbox.confine
def confine(*given):
    return {kernel} if os.path.exists("wanted") else replace(whole(*given), files=True)
sandbox.confine = confine
"""
    with pytest.raises(ChildEnded, match=f"could not be confined as in the rehearsal: .*{told}") as caught:
        await read_by_a_child(tmp_path, monkeypatch, otherwise)
    # No fault of the model.
    assert caught.value.exit.kind is ExitKind.KILLED


def test_of_a_folder_that_python_imports_from_only_modules_are_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (
        "package/__init__.py",
        "state/key.pem",
        "key.pem",
        "module.py",
        "vendored.libs/one.so",
        "lib/two.so.1",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path / 'lib'}:")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(tmp_path / "gone")])
    found = reading.readable()
    mine = {str(Path(each).relative_to(tmp_path)) for each in found if Path(each).is_relative_to(tmp_path)}
    assert mine == {"package", "module.py", "vendored.libs", "lib/two.so.1"}
    # One rule each, which every child sets anew.
    assert not [each for each in found if each != "/" and any(each.startswith(f"{other}/") for other in found)]


@pytest.mark.parametrize("variable", ["state_dir", "key_file"])
async def test_a_validator_keeps_nothing_among_what_model_servers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(package)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    given = {"state_dir": tmp_path / "state", variable: tmp_path / "elsewhere" / "link" / "kept"}
    with pytest.raises(SystemExit) as refused:
        await build(ValidatorSettings(registry="127.0.0.1:1", **given), on_drained=lambda: None)
    assert refused.value.code == 2
    told = f"TILTYARD_{variable.upper()}: {given[variable]} lies in {package}, which model servers may read\n"
    assert capsys.readouterr().err == told
    assert library_around(tmp_path / "state") is None
    # Nothing was made there.
    assert sorted(each.name for each in tmp_path.iterdir()) == ["elsewhere", "package"]
    assert [each.name for each in package.iterdir()] == ["__init__.py"]
