"""HTTP/1.1 as uvicorn speaks it, with a bound to the time in which the head of a request must have come.

Without one a client that sends a head byte by byte, or nothing at all, holds a connection for ever. The body has a
bound in :mod:`tc_deploy.serving.gate`, and uvicorn's own is for connections that are idle after an answer.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_S = 10.0


class HeadInTime(H11Protocol):
    """See the module."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """A client has sent something."""
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has gone."""
        self._stop()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Wait for a head where none is answered, and only there."""
        request: RequestResponseCycle | None = self.cycle
        if request is not None and not request.response_complete:
            self._stop()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
