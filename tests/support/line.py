"""A port that leads to a server until it is cut, for the tests of what becomes of connections."""

import asyncio

from services.runtime.server import ArenaServer


class Line:
    """Leads to a server from a port of its own, the same one each time that it is entered."""

    def __init__(self, to: ArenaServer, *, delay_s: float = 0) -> None:
        self.port = 0
        self.connections = 0
        """So many were taken in all."""
        self._to = to
        self._delay_s = delay_s
        self._leading: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Line":
        self._listener = await asyncio.start_server(self._take, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def cut(self) -> None:
        """As when the process at the other end dies."""
        self._listener.close()
        for leading in self._leading:
            leading.cancel()
        await asyncio.gather(*self._leading, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        leading = asyncio.ensure_future(self._lead(reader, writer))
        self._leading.add(leading)
        leading.add_done_callback(self._leading.discard)

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.sleep(self._delay_s)
            there, back = await asyncio.open_connection("127.0.0.1", self._to.port)
            try:
                await asyncio.gather(_pump(reader, back), _pump(there, writer), return_exceptions=True)
            finally:
                back.transport.abort()
        finally:
            writer.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while content := await source.read(65536):
        sink.write(content)
    sink.close()
