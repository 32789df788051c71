"""The RPCs without their transport: messages in, messages out, domain errors raised. Runs on the event loop."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from lora_api.v1 import adapter_service_pb2 as adapter_service
from lora_api.v1 import generation_service_pb2 as generation
from lora_api.v1 import image_pb2, server_service_pb2

from lora_server.config import LimitsConfig, RpcConfig
from lora_server.errors import (
    FieldFault,
    InvalidRequestError,
    LoraServerError,
    ResponseTooLargeError,
    UploadsDisabledError,
)
from lora_server.rpc import convert, validate
from lora_server.rpc.backend import Backend
from lora_server.rpc.events import follow
from lora_server.rpc.uploads import Uploads, receive_upload
from lora_server.rpc.watching import Watchers, watch
from lora_server.security.caller import current_caller
from lora_server.types import (
    MAX_DROPPED_CHARS,
    AdapterInfo,
    EncodedImage,
    GenerationRequest,
    ImageEvent,
    ImageFormat,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    StatsEvent,
)
from lora_server.use_settings import MAX_TRIGGER_CHARS

CHUNK_BYTES = 1024 * 1024
DEFAULT_MAX_RESPONSE_BYTES = 4 * 1024 * 1024 - 64 * 1024
_DEFAULT_PREVIEW_INTERVAL = 5
_DEFAULT_PAGE_SIZE = 100
_AT_A_TIME = 16
# Beside the pixels: file headers, and the metadata, in the file and in the message, at up to 12 bytes a character.
_OVERHEAD_BYTES = 16 * 1024
_BYTES_A_CHARACTER = 16


def possible_image_bytes(width_px: int, height_px: int, image_format: ImageFormat, prompt_chars: int) -> int:
    """Bounds the bytes of one image in a response, whatever it shows.

    PNG and WebP fall back to storing: 3 bytes a pixel, one filter byte a row, 1/64 for block headers. A JPEG of quality
    95 stays below that on noise (measured 2.5 bytes a pixel).
    """
    del image_format  # one bound holds for all three
    pixels = 3 * width_px * height_px + height_px
    return pixels + pixels // 64 + _OVERHEAD_BYTES + _BYTES_A_CHARACTER * prompt_chars


@dataclass(frozen=True, slots=True)
class Handlers:
    """All RPCs of the three services."""

    backend: Backend
    limits: LimitsConfig
    watchers: Watchers = field(default_factory=lambda: Watchers(RpcConfig().max_watchers))
    uploads: Uploads = field(default_factory=lambda: Uploads(RpcConfig()))

    # GenerationService

    async def generate(
        self,
        request: generation.GenerateRequest,
        deadline_s: float | None,
        on_end: Callable[[Callable[[], None]], None] = lambda _: None,
    ) -> generation.GenerateResponse:
        """Makes images and returns them at once; see the contract.

        The images count against their tenant until what is given to *on_end* is called, when the call has ended.
        """
        with self._telling_refusals(request):
            self._rules.check_generate(request)
            domain = self._request(request, deadline_s)
            self._check_response_size(request, domain)
            job = self.backend.engine.submit(domain)
        on_end(job.keep())
        images: list[EncodedImage] = []
        async with aclosing(follow(job)) as events:
            async for event in events:
                if isinstance(event, ImageEvent):
                    images.append(event.image)
                elif isinstance(event, StatsEvent):
                    stats = convert.stats_message(event.stats)
        images.sort(key=lambda image: image.index)
        return generation.GenerateResponse(
            request_id=domain.request_id,
            images=[image_pb2.Image(info=convert.image_info(image), data=image.data) for image in images],
            stats=stats,
        )

    async def stream_generate(
        self, request: generation.StreamGenerateRequest, deadline_s: float | None
    ) -> AsyncGenerator[generation.StreamGenerateResponse, None]:
        """Makes images and streams what happens; see the contract."""
        with self._telling_refusals(request):
            self._rules.check_stream(request)
            domain = self._request(request, deadline_s)
            job = self.backend.engine.submit(domain)
        async with aclosing(follow(job)) as events:
            async for event in events:
                if isinstance(event, ImageEvent):
                    for chunk in _chunks(event.image):
                        yield generation.StreamGenerateResponse(image_chunk=chunk)
                else:
                    yield _event_message(event, domain)

    @contextmanager
    def _telling_refusals(
        self, request: generation.GenerateRequest | generation.StreamGenerateRequest
    ) -> Iterator[None]:
        """Tells of a request that is not accepted; of one that is, the engine tells how it ended."""
        try:
            yield
        except LoraServerError as error:
            shown = request.request_id[: validate.MAX_REQUEST_ID_CHARS]
            self.backend.observer.request_refused(shown, current_caller().tenant, error.reason)
            raise

    @property
    def _rules(self) -> validate.RequestRules:
        return validate.RequestRules(self.limits, self.backend.engine.model)

    def _request(
        self, request: generation.GenerateRequest | generation.StreamGenerateRequest, deadline_s: float | None
    ) -> GenerationRequest:
        request_id = request.request_id or convert.new_request_id()
        interval, preview = 1, None
        if isinstance(request, generation.StreamGenerateRequest):
            interval = request.progress_interval_steps or 1
            if request.HasField("preview"):
                preview = request.preview.interval_steps or _DEFAULT_PREVIEW_INTERVAL
        return GenerationRequest(
            request_id=request_id,
            parameters=convert.parameters(request.spec, self.backend.engine.model, request_id),
            adapters=tuple(convert.adapter_use(use) for use in request.spec.adapters),
            tenant=current_caller().tenant,
            format=convert.image_format(request.spec.format),
            deadline_s=deadline_s,
            progress_interval_steps=interval,
            preview_interval_steps=preview,
            traceparent=self.backend.traceparent(),
        )

    def _check_response_size(self, request: generation.GenerateRequest, domain: GenerationRequest) -> None:
        limit = request.max_response_bytes if request.HasField("max_response_bytes") else DEFAULT_MAX_RESPONSE_BYTES
        wanted = domain.parameters
        characters = len(wanted.prompt) + len(wanted.negative_prompt)
        # The adapters' settings are repeated in the metadata, and trigger words come to the prompt.
        characters += sum(use.ByteSize() for use in request.spec.adapters)
        triggers = MAX_TRIGGER_CHARS * sum(use.use_trigger_words for use in request.spec.adapters)
        characters += triggers
        # So is what the tokenizers cut off, for each of the encoders.
        lengths = len(wanted.prompt) + triggers, len(wanted.negative_prompt)
        dropped = sum(min(MAX_DROPPED_CHARS, length) for length in lengths)
        characters += dropped * len(self.backend.engine.model.adaptable_components)
        possible = wanted.num_images * possible_image_bytes(
            wanted.width_px, wanted.height_px, domain.format, characters
        )
        if possible > limit:
            raise ResponseTooLargeError(possible, limit)

    # AdapterService

    async def load_adapter(self, request: adapter_service.LoadAdapterRequest) -> adapter_service.LoadAdapterResponse:
        """Loads and registers an adapter; see the contract."""
        validate.check_load(request)
        outcome = await asyncio.wrap_future(
            self.backend.adapters.load(
                convert.adapter_source(request.source),
                default_scale=convert.shortest(request.default_scale) if request.HasField("default_scale") else None,
                replace=request.replace,
                allow_partial=request.allow_partial,
                tenants=frozenset(request.tenants.names) if request.HasField("tenants") else None,
                viewer=current_caller().viewer,
            )
        )
        await self._saved()
        return adapter_service.LoadAdapterResponse(
            adapter=convert.adapter_message(outcome.adapter), load_time=convert.duration(outcome.load_time_s)
        )

    async def upload_adapter(
        self, requests: AsyncIterator[adapter_service.UploadAdapterRequest]
    ) -> adapter_service.UploadAdapterResponse:
        """Stores and loads an adapter's files; see the contract."""
        if self.backend.adapters.store is None:
            raise UploadsDisabledError()
        with self.uploads.one_more(current_caller().tenant):
            adapters, store = self.backend.adapters, self.backend.adapters.store
            outcome = await receive_upload(requests, store, adapters, self.limits, self.uploads.config)
        await self._saved()
        return adapter_service.UploadAdapterResponse(
            adapter=convert.adapter_message(outcome.adapter), load_time=convert.duration(outcome.load_time_s)
        )

    async def unload_adapter(
        self, request: adapter_service.UnloadAdapterRequest
    ) -> adapter_service.UnloadAdapterResponse:
        """Forgets an adapter; see the contract."""
        validate.check_ref(request.adapter)
        freed = self.backend.adapters.unload(
            convert.adapter_ref(request.adapter), drain=request.drain, viewer=current_caller().viewer
        )
        await self._saved()
        return adapter_service.UnloadAdapterResponse(freed_bytes=freed)

    async def pin_adapter(self, request: adapter_service.PinAdapterRequest) -> adapter_service.PinAdapterResponse:
        """Pins an adapter; see the contract."""
        validate.check_pin(request)
        ttl_s = request.ttl.ToNanoseconds() / 1e9 if request.HasField("ttl") else None
        pinning = self.backend.adapters.pin(
            convert.adapter_ref(request.adapter), convert.pin_level(request.level), ttl_s, current_caller().viewer
        )
        info = await asyncio.wrap_future(pinning)
        await self._saved()
        return adapter_service.PinAdapterResponse(adapter=convert.adapter_message(info))

    async def unpin_adapter(self, request: adapter_service.UnpinAdapterRequest) -> adapter_service.UnpinAdapterResponse:
        """Ends a pin; see the contract."""
        validate.check_ref(request.adapter)
        info = self.backend.adapters.unpin(convert.adapter_ref(request.adapter), current_caller().viewer)
        await self._saved()
        return adapter_service.UnpinAdapterResponse(adapter=convert.adapter_message(info))

    async def _saved(self) -> None:
        """Waits until what was changed survives a crash: only then is it acknowledged."""
        await asyncio.wrap_future(self.backend.adapters.saved())

    async def get_adapter(self, request: adapter_service.GetAdapterRequest) -> adapter_service.GetAdapterResponse:
        """Returns an adapter; see the contract."""
        validate.check_ref(request.adapter)
        info = self.backend.adapters.get(convert.adapter_ref(request.adapter), current_caller().viewer)
        return adapter_service.GetAdapterResponse(adapter=convert.adapter_message(info))

    async def list_adapters(self, request: adapter_service.ListAdaptersRequest) -> adapter_service.ListAdaptersResponse:
        """Returns a page of adapters; see the contract."""
        validate.check_list(request)
        after = _decode_token(request.page_token)
        size = request.page_size or _DEFAULT_PAGE_SIZE
        response = adapter_service.ListAdaptersResponse()
        # By name, so that pages are stable whatever comes or goes.
        infos = self.backend.adapters.page(current_caller().viewer, after, request.name_prefix)
        for looked_at, info in enumerate(infos, 1):
            if looked_at % _AT_A_TIME == 0:
                await asyncio.sleep(0)  # a long page lets other calls in
            if not _in_states(info, request.states):
                continue
            if len(response.adapters) == size:
                response.next_page_token = _encode_token(response.adapters[-1].name)
                break
            response.adapters.append(convert.adapter_message(info))
        return response

    # ServerService

    async def get_server_info(
        self, request: server_service_pb2.GetServerInfoRequest
    ) -> server_service_pb2.GetServerInfoResponse:
        """Says what the server is; see the contract."""
        del request
        model, limits = self.backend.engine.model, self.limits
        return server_service_pb2.GetServerInfoResponse(
            version=self.backend.version,
            start_time=convert.timestamp(self.backend.start_time_s),
            model=convert.model_message(model),
            limits=server_service_pb2.RequestLimits(
                size_multiple_px=model.size_multiple_px,
                max_side_px=self._rules.max_side_px,
                max_inference_steps=limits.max_inference_steps,
                max_images_per_request=limits.max_images_per_request,
                max_adapters_per_request=limits.max_adapters_per_request,
                max_prompt_chars=limits.max_prompt_chars,
                max_rank=limits.max_rank,
                result_retention_time=convert.duration(self.backend.result_retention_s),
                max_request_megapixel_steps=limits.max_request_megapixel_steps,
            ),
            cache=convert.cache_info_message(self.backend.adapters.cache_info()),
            queue=convert.queue_info_message(self.backend.engine.queue_info()),
            engine=convert.engine_info_message(self.backend.engine.info()),
        )

    async def watch_server(
        self, request: server_service_pb2.WatchServerRequest, deadline_s: float | None
    ) -> AsyncGenerator[server_service_pb2.WatchServerResponse, None]:
        """Says what the server does, again and again; see the contract."""
        del deadline_s  # gRPC ends the call
        async with aclosing(watch(self.backend, self.watchers, request)) as responses:
            async for response in responses:
                yield response


def _event_message(
    event: QueuedEvent | ProgressEvent | PreviewEvent | StatsEvent, request: GenerationRequest
) -> generation.StreamGenerateResponse:
    if isinstance(event, QueuedEvent):
        queued = generation.Queued(
            request_id=request.request_id,
            position=event.position,
            seed=request.parameters.seed,
            expected_time=None if event.expected_s is None else convert.duration(event.expected_s),
        )
        return generation.StreamGenerateResponse(queued=queued)
    if isinstance(event, ProgressEvent):
        progress = generation.Progress(
            completed_steps=event.completed_steps,
            total_steps=event.total_steps,
            elapsed_time=convert.duration(event.elapsed_time_s),
        )
        return generation.StreamGenerateResponse(progress=progress)
    if isinstance(event, PreviewEvent):
        preview = generation.Preview(
            image_index=event.image_index, completed_steps=event.completed_steps, data=event.data
        )
        return generation.StreamGenerateResponse(preview=preview)
    return generation.StreamGenerateResponse(stats=convert.stats_message(event.stats))


def _chunks(image: EncodedImage) -> Iterator[generation.ImageChunk]:
    """Yields the parts of an image as they are wanted, so that a slow reader's image is not there twice."""
    view = memoryview(image.data)
    for offset in range(0, len(view), CHUNK_BYTES):
        yield generation.ImageChunk(
            image_index=image.index,
            info=convert.image_info(image) if offset == 0 else None,
            offset_bytes=offset,
            data=bytes(view[offset : offset + CHUNK_BYTES]),
        )


def _in_states(info: AdapterInfo, states: Sequence[int]) -> bool:
    """Whether the current version is in one of *states*; no states are all."""
    current = next(version for version in info.versions if version.digest == info.current_digest)
    return not states or convert.state_value(current.state) in states


def _encode_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _decode_token(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token.encode("ascii")).decode("utf-8")
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError([FieldFault("page_token", "is not a token of this server")]) from error
