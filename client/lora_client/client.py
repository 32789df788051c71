"""The blocking client: `LoraClient`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lora_api.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    generation_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)

from lora_client import _requests, _results, _upload
from lora_client._assembly import Assembly, ResultCollector
from lora_client._channel import Tls, bearer_metadata, call_metadata, channel_options
from lora_client._fields import message, seconds
from lora_client._retry import Attempts, RetryPolicy
from lora_client._trace import trace_metadata
from lora_client._uses import parse_uses
from lora_client.addresses import DEFAULT_SERVER, target
from lora_client.errors import QueueFullError, UnavailableError, from_rpc_error
from lora_client.types import (
    Adapter,
    AdaptersLike,
    AdapterUse,
    Event,
    GenerationOptions,
    GenerationResult,
    ServerInfo,
    ServerWatch,
)

_POLL_S = 0.2


class AdapterCalls:
    """The control plane: `client.adapters`. An adapter is named by its name, or by its id as a number."""

    def __init__(self, channel: grpc.Channel, call: Callable[[Any, Any], Any]) -> None:
        self._stub = adapter_service_pb2_grpc.AdapterServiceStub(channel)
        self._server = server_service_pb2_grpc.ServerServiceStub(channel)
        self._call = call

    def load(
        self,
        path: str,
        *,
        name: str | None = None,
        id: int | None = None,  # noqa: A002 - the contract's word
        default_scale: float | None = None,
        replace: bool = False,
        allow_partial: bool = False,
        tenants: Sequence[str] | None = None,
    ) -> Adapter:
        """Reads, checks, registers and caches the adapter at *path* on the server; idempotent.

        *allow_partial* leaves out tensors whose module the model has not, and embeddings beside the files;
        `current.report` names them. *tenants* are the only ones that may use it; none of them opens it to everybody,
        None changes nothing.
        """
        request = _requests.load_request(
            path,
            name=name,
            id=id,
            default_scale=default_scale,
            replace=replace,
            allow_partial=allow_partial,
            tenants=tenants,
        )
        response = self._call(self._stub.LoadAdapter, request)
        return _results.adapter(response.adapter)

    def push(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        default_scale: float | None = None,
        replace: bool = False,
        allow_partial: bool = False,
        tenants: Sequence[str] | None = None,
    ) -> Adapter:
        """Sends the adapter at the local *path*, a folder or a .safetensors file, and loads it; idempotent.

        *name* is made from the path's if it is not given. Another push under the name is its next version; *replace*
        takes the name from something that was not pushed. *tenants* as in `load`. The server needs a state directory.

        Raises:
            ValueError: If there is no adapter at *path*.
        """
        info = self._call(self._server.GetServerInfo, server_service_pb2.GetServerInfoRequest())
        files = _upload.local_files(path, info.model.adaptable_components, allow_partial=allow_partial)
        manifest = _requests.upload_manifest(
            name or _upload.default_name(path),
            default_scale=default_scale,
            replace=replace,
            allow_partial=allow_partial,
            tenants=tenants,
        )
        response = self._call(self._stub.UploadAdapter, _upload.requests(files, manifest))
        return _results.adapter(response.adapter)

    def unload(self, adapter: str | int, *, drain: bool = False) -> int:
        """Forgets an adapter; returns the bytes freed at once. With *drain*, running requests may finish on it."""
        request = message(adapter_service_pb2.UnloadAdapterRequest, adapter=_requests.ref_message(adapter), drain=drain)
        response = self._call(self._stub.UnloadAdapter, request)
        return int(response.freed_bytes)

    def pin(self, adapter: str | int, *, level: str = "host", ttl_s: float | None = None) -> Adapter:
        """Keeps an adapter loaded, in `host` memory or on the `device`, for *ttl_s* seconds or without an end."""
        request = _requests.pin_request(adapter, level, ttl_s)
        response = self._call(self._stub.PinAdapter, request)
        return _results.adapter(response.adapter)

    def unpin(self, adapter: str | int) -> Adapter:
        """Ends a pin; idempotent."""
        request = adapter_service_pb2.UnpinAdapterRequest(adapter=_requests.ref_message(adapter))
        response = self._call(self._stub.UnpinAdapter, request)
        return _results.adapter(response.adapter)

    def get(self, adapter: str | int) -> Adapter:
        """Returns one adapter."""
        request = adapter_service_pb2.GetAdapterRequest(adapter=_requests.ref_message(adapter))
        response = self._call(self._stub.GetAdapter, request)
        return _results.adapter(response.adapter)

    def list(self, *, states: Sequence[str] = (), name_prefix: str = "") -> tuple[Adapter, ...]:
        """Returns the registered adapters by name, page after page; all, or those in *states* and with *name_prefix*.

        Raises:
            ValueError: If a state is none of registered, loading, cached, resident, failed.
        """
        adapters: tuple[Adapter, ...] = ()
        token = ""
        while True:
            request = _requests.list_request(states, name_prefix, token)
            response = self._call(self._stub.ListAdapters, request)
            adapters += tuple(_results.adapter(each) for each in response.adapters)
            token = response.next_page_token
            if not token:
                return adapters


class LoraClient:
    """A client that blocks. Thread-safe; one is enough for a process.

    with LoraClient("127.0.0.1:50051") as client:
        client.generate("a red star", adapters=["neon:0.8"], seed=42).images[0].save("star.png")
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        timeout_s: float | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
    ) -> None:
        """Connects lazily to HOST[:PORT], port 50051 by default, or unix:PATH.

        *timeout_s* bounds each call, None does not.

        What is on this machine is reached through no proxy; for a remote address gRPC asks the environment.

        *retry* says how often a request for images is sent again while the server's queue is full.

        *token* goes with every call, and only over TLS, loopback or a Unix socket.

        Raises:
            ValueError: If *server* is no address, or the token would go over a network in plain text.
        """
        address = target(server)
        self._bearer = bearer_metadata(address, tls, token)
        options = channel_options(address, tls)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options=options)
        self._timeout_s = None if timeout_s is None else seconds("timeout_s", timeout_s)
        self._retry = retry
        self._generation = generation_service_pb2_grpc.GenerationServiceStub(self._channel)
        self._server = server_service_pb2_grpc.ServerServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self.adapters = AdapterCalls(self._channel, self._call)

    def __enter__(self) -> LoraClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every call on it. Idempotent."""
        self._channel.close()

    def generate(
        self,
        prompt: str,
        *,
        adapters: AdaptersLike = (),
        seed: int | None = None,
        options: GenerationOptions | None = None,
    ) -> GenerationResult:
        """Makes images. Streams inside, so that images of any size fit.

        *adapters* is a name with or without a scale (`"neon:0.5"`), a mapping of names to scales, a pair, a dictionary
        of `AdapterUse`'s fields, an `AdapterUse`, or a list of these.

        Raises:
            LoraClientError: One class a reason; see `lora_client.errors`.
            TypeError, ValueError: If an argument is not of its type or range, or an adapter's text not understood.
        """
        collector = ResultCollector()
        for event in self.stream_generate(prompt, adapters=adapters, seed=seed, options=options):
            collector.add(event)
        return collector.result()

    def stream_generate(
        self,
        prompt: str,
        *,
        adapters: AdaptersLike = (),
        seed: int | None = None,
        options: GenerationOptions | None = None,
    ) -> Iterator[Event]:
        """Makes images and yields what happens; `Completed` is last. Leaving the iteration cancels the request.

        Raises:
            LoraClientError: One class a reason; see `lora_client.errors`.
            TypeError, ValueError: If an argument is not of its type or range, or an adapter's text not understood.
        """
        uses = parse_uses(adapters)
        request = _requests.stream_request(prompt, uses, seed, GenerationOptions() if options is None else options)
        attempts = Attempts(self._retry, self._timeout_s)
        while True:
            try:
                yield from self._stream(request, uses, attempts.remaining_s())
                return
            except QueueFullError as error:  # of which there is none once the server has taken the request
                wait_s = attempts.wait_s(error)
            time.sleep(wait_s)

    def _stream(self, request: Any, uses: Sequence[AdapterUse], timeout_s: float | None) -> Iterator[Event]:
        """Sends *request* once."""
        call = self._generation.StreamGenerate(
            request, timeout=timeout_s, metadata=(*call_metadata(uses), *self._metadata())
        )
        assembly = Assembly()
        try:
            for response in call:
                event = assembly.feed(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()  # an abandoned stream is not cancelled by itself

    def server_info(self) -> ServerInfo:
        """Returns the server's model, defaults, limits, cache and queue."""
        response = self._call(self._server.GetServerInfo, server_service_pb2.GetServerInfoRequest())
        return _results.server_info(response)

    def watch_server(self, *, interval_s: float = 1.0, max_adapters: int = 20) -> Generator[ServerWatch, None, None]:
        """Yields what the server does, at once and every *interval_s*, with its most used adapters, until it is left.

        Raises:
            LoraClientError: One class a reason; see `lora_client.errors`.
        """
        call = self._server.WatchServer(_requests.watch_request(interval_s, max_adapters), metadata=self._metadata())
        try:
            for response in call:
                yield _results.server_watch(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    def health(self, service: str = "") -> bool:
        """Returns whether the server, or one of its services, is SERVING."""
        response = self._call(self._health.Check, message(health_pb2.HealthCheckRequest, service=service))
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Waits until the server serves.

        Raises:
            UnavailableError: If it does not within *timeout_s*.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                if self.health():
                    return
            except UnavailableError:
                pass
            time.sleep(_POLL_S)
        raise UnavailableError(f"the server does not serve after {timeout_s:g} s", code="UNAVAILABLE")

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call: who makes it, and the trace that it belongs to."""
        return (*self._bearer, *trace_metadata())

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
