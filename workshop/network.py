"""A network that can be cut: a proxy before the database, on 127.0.0.1, that stops in the middle without a word.

So it looks when a firewall forgets a connection or a machine vanishes: nobody says goodbye, and to the client the
connection is as good as ever. On Linux the kernel is silent as well: what arrives is not even acknowledged, as by a
machine that is gone. Elsewhere it is, and only no answer comes.
"""

from __future__ import annotations

import asyncio
import ctypes
import struct
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import SOL_SOCKET, socket

from sqlalchemy.engine import make_url

IS_SILENT = sys.platform == "linux"
"""Whether a cut silences the kernel, too."""

# A packet filter of one instruction, which keeps 0 bytes of whatever arrives. Anybody may put one on a socket of
# their own. (man 7 socket; BPF_RET in Documentation/networking/filter.rst of Linux.)
_ATTACH_FILTER, _DETACH_FILTER = 26, 27
_KEEP_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)


class Network:
    """The way to a database: `url` leads over it."""

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._is_cut = False
        self._writers: list[StreamWriter] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self._listener = socket()

    async def _open(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0, backlog=1000)
        self._listener = server.sockets[0]
        return server

    @property
    def url(self) -> str:
        """The address for create_async_engine."""
        port = self._listener.getsockname()[1]
        return self._target.set(port=port).render_as_string(hide_password=False)

    async def cut(self) -> None:
        """From now on nothing goes through, neither way, and nobody is told."""
        self._is_cut = True
        for pump in self._pumps:
            pump.cancel()
        # What arrived last is acknowledged later, by up to a fifth of a second; else our kernel would send it again
        # and again, and the other end take that for a sign of life.
        await asyncio.sleep(0.3)
        for writer in self._writers:
            _silence(writer.get_extra_info("socket"))
        _silence(self._listener)

    def mend(self) -> None:
        """New connections go through again. Those that were cut stay as they are: nothing will come of them."""
        if IS_SILENT:
            self._listener.setsockopt(SOL_SOCKET, _DETACH_FILTER, 0)
        self._is_cut = False

    def _close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._writers.append(writer)
        if self._is_cut:
            return
        answers, asking = await asyncio.open_connection(self._target.host, self._target.port)
        self._writers.append(asking)
        for source, sink in ((reader, asking), (answers, writer)):
            pump = asyncio.create_task(_pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)


async def _pump(source: StreamReader, sink: StreamWriter) -> None:
    try:
        while data := await source.read(2**16):
            sink.write(data)
            await sink.drain()
    except ConnectionError:
        pass  # one side is gone; the other learns it from the end
    sink.close()


def _silence(connected: socket) -> None:
    if IS_SILENT:
        instruction = ctypes.create_string_buffer(_KEEP_NOTHING, len(_KEEP_NOTHING))
        program = struct.pack("HP", 1, ctypes.addressof(instruction))
        connected.setsockopt(SOL_SOCKET, _ATTACH_FILTER, program)


@asynccontextmanager
async def network_to(url: str) -> AsyncIterator[Network]:
    """A network between here and the database at `url`, to the end of the block."""
    network = Network(url)
    async with await network._open():
        try:
            yield network
        finally:
            network._close()
