"""The port from which Prometheus scrapes: prometheus_client's own application, within bounds of threads and time.

Whoever reaches the port may ask, so that connections are few, the oldest gives way to the newest, none lasts for long,
and pages are not made faster than anybody needs them: each takes the interpreter from the engine for milliseconds.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

MAX_CONNECTIONS = 16
MAX_CONNECTION_S = 10.0
_PAGE_EVERY_S = 0.1
_BACKLOG = 64


class Exporter:
    """Serves a registry over HTTP until it is stopped."""

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Listens on HOST:PORT at once.

        Raises:
            OSError: If the address cannot be bound.
        """
        host, _, port = listen.rpartition(":")
        try:
            found = socket.getaddrinfo(
                host.strip("[]") or "0.0.0.0", int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, _, _, _, address = found[0]
            kind = type("Server", (_BoundedServer,), {"address_family": family})
            app = _Paced(make_wsgi_app(registry))
            self._server: WSGIServer = make_server(str(address[0]), int(port), app, kind, _SilentHandler)
        except OSError as error:
            raise OSError(f"cannot serve metrics on {listen}: {error.strerror or error}") from error
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it. Idempotent; blocks for at most half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Paced:
    """An application of which one page at a time is made, and a tenth of a second passes between two."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._made_s = float("-inf")

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            time.sleep(max(0.0, self._made_s + _PAGE_EVERY_S - time.monotonic()))
            page = self._app(environ, start_response)
            self._made_s = time.monotonic()
        return page


class _SilentHandler(WSGIRequestHandler):
    """Logs nothing, and waits for its peer only so long."""

    timeout = MAX_CONNECTION_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Does nothing."""

    def handle(self) -> None:
        """Answers one request; a peer that goes away is no error."""
        with contextlib.suppress(OSError):
            super().handle()


class _BoundedServer(ThreadingMixIn, WSGIServer):
    """A thread a connection, but few: one too many ends the oldest, as its time does."""

    daemon_threads = True
    request_queue_size = _BACKLOG

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._began_s: dict[socket.socket, float] = {}  # the oldest first
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins with a connection, at the cost of the oldest; closes it if those that end are not gone yet."""
        open_now = list(self._began_s)
        if len(open_now) >= 2 * MAX_CONNECTIONS:
            self.shutdown_request(request)
            return
        for oldest in open_now[: max(0, len(open_now) - MAX_CONNECTIONS + 1)]:
            _hang_up(oldest)
        self._began_s[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Ends connections whose time is over; called twice a second, and after each new one."""
        late_s = time.monotonic() - MAX_CONNECTION_S
        for connection, began_s in list(self._began_s.items()):
            if began_s < late_s:
                _hang_up(connection)

    def shutdown_request(self, request: Any) -> None:
        """Ends and forgets a connection."""
        self._began_s.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a peer that goes away is no error of the server's."""


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have ended by itself
        connection.shutdown(socket.SHUT_RDWR)
