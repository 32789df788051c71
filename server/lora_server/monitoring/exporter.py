"""The port from which Prometheus scrapes: prometheus_client's own server, on a thread of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server


class Exporter:
    """Serves a registry over HTTP until it is stopped."""

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Listens on HOST:PORT at once.

        Raises:
            OSError: If the address cannot be bound.
        """
        host, _, port = listen.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]") or "0.0.0.0", registry)
        except OSError as error:
            raise OSError(f"cannot serve metrics on {listen}: {error.strerror or error}") from error
        self.address = f"{host}:{self._server.server_port}"

    def stop(self) -> None:
        """Ends it. Idempotent; blocks for at most half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
