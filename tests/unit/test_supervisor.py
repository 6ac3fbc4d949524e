"""What the supervisor does with files, apart from its processes."""

from pathlib import Path

from tiltyard.cli.supervisor import bound_log


def test_a_log_is_put_aside_when_it_is_too_long_and_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "registry.log"
    bound_log(path, 10)
    # As a child writes to the descriptor that it was started with.
    with path.open("ab", buffering=0) as log:
        for line in (b"short\n", b"longer than that\n", b"after\n", b"the second time\n", b"end\n"):
            log.write(line)
            bound_log(path, 10)
    assert path.read_bytes() == b"end\n"
    assert (tmp_path / "registry.log.1").read_bytes() == b"after\nthe second time\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["registry.log", "registry.log.1"]
