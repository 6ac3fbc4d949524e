"""The `tiltyard` command: everything that a participant, an operator or an onlooker does from a shell."""


def app() -> None:
    """Runs the command that was typed; the commands themselves are in `commands`."""
    try:
        # Takes a moment, in which somebody may think better of it.
        from tiltyard.cli import commands, output
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    output.open_output()
    commands.app(prog_name="tiltyard")
