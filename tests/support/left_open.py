"""Opens COUNT connections to PORT from one address and leaves them: every second one says hello in HTTP/2.

`python -m tests.support.left_open PORT COUNT` prints a line when all are open, and ends when its input does.
"""

import contextlib
import socket
import sys

from services.runtime.connections import raise_file_limit

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def main(port: int, count: int) -> None:
    """See above."""
    raise_file_limit()
    opened = []
    for number in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=("127.0.0.2", 0))
        # The server may have hung up already.
        with contextlib.suppress(ConnectionError):
            connection.sendall(PREFACE if number % 2 else b"")
        opened.append(connection)
    sys.stdout.write(f"{len(opened)}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
