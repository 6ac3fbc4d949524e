"""A real S3 server in a process of its own (moto), with nothing on disk."""

import re
import subprocess
import sys
import urllib.request
from types import TracebackType
from typing import Self

_READY = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")


class S3Server:
    """Runs from entering the context to leaving it; `bucket` makes an empty bucket and returns its URL."""

    def __init__(self) -> None:
        self._count = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = b""
        while (ready := _READY.search(said)) is None:
            assert self._process.stderr is not None
            line = self._process.stderr.readline()
            if not line:
                self.__exit__(None, None, None)
                raise RuntimeError(f"no S3 server: {said.decode()}")
            said += line
        self.endpoint = ready[1].decode()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def environment(self) -> dict[str, str]:
        """What an S3 client finds it by."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }

    def bucket(self) -> str:
        """The URL of an empty bucket, with a prefix in it."""
        self._count += 1
        request = urllib.request.Request(f"{self.endpoint}/bucket-{self._count}", method="PUT")
        urllib.request.urlopen(request).close()
        return f"s3://bucket-{self._count}/arena/artifacts"
