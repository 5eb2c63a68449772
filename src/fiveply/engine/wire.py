"""A rank's end of the connection to the driver: blocking, with time-outs. Messages are `serve/messages.py`'s."""

from __future__ import annotations

import socket

import msgspec

from fiveply.serve.messages import LARGEST, FromDriver, FromRank, pack


class Wire:
    """The connection; each end frames a message by its length."""

    def __init__(self, host: str, port: int, timeout_seconds: float) -> None:
        self._socket = socket.create_connection((host, port), timeout=timeout_seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._decoder = msgspec.msgpack.Decoder(FromDriver)
        self._held = bytearray()

    def send(self, message: FromRank) -> None:
        self._socket.sendall(pack(message))

    def receive(self, timeout_seconds: float) -> FromDriver | None:
        """The next message, or None where none came in time. Raises ConnectionError when the driver is gone."""
        self._socket.settimeout(timeout_seconds)
        while (message := self._take()) is None:
            try:
                read = self._socket.recv(1 << 16)
            except TimeoutError:
                return None
            if not read:
                raise ConnectionError("the driver closed the connection")
            self._held += read
        return message

    def close(self) -> None:
        self._socket.close()

    def _take(self) -> FromDriver | None:
        if len(self._held) < 4:
            return None
        end = 4 + int.from_bytes(self._held[:4], "little")
        if end - 4 > LARGEST:
            raise ConnectionError(f"a message of {end - 4} bytes")
        if len(self._held) < end:
            return None
        message = self._decoder.decode(memoryview(self._held)[4:end])
        self._held = self._held[end:]
        return message
