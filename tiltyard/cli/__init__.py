"""The `tiltyard` command: everything that a participant, an operator or an onlooker does from a shell."""

import sys
from typing import NoReturn


def app() -> None:
    """Runs the command that was typed; the commands themselves are in `commands`."""
    try:
        # Takes a moment, in which somebody may think better of it.
        from tiltyard.cli import commands, output
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    output.open_output()
    try:
        commands.app(prog_name="tiltyard")
    except SystemExit as ended:
        if not ended.code:
            _flush()
        raise
    except OSError as error:
        _refused(error)
    finally:
        output.end_output()


def _flush() -> None:
    """Has all on its way that a command printed. Ends with status 1 where it can't be."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(1) from None  # as click ends a command whose reader has gone
    except OSError as error:
        _refused(error)


def _refused(error: OSError) -> NoReturn:
    from tiltyard.cli.connection import in_words

    print(f"error: {in_words(error)}", file=sys.stderr)
    raise SystemExit(1) from None
