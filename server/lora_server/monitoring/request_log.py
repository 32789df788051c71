"""The log of requests: one line for each, whether it got its images, failed, or was never accepted."""

from __future__ import annotations

import structlog

from lora_server.observer import OK, RequestSummary, SilentObserver

_log = structlog.get_logger(__name__)
_DIGITS = 4


class RequestLog(SilentObserver):
    """Writes the event `request`; never a prompt, unless it is asked to."""

    def __init__(self, *, prompts: bool = False) -> None:
        self._prompts = prompts

    def request_refused(self, request_id: str, tenant: str, reason: str) -> None:
        """Writes the line of a request that was not accepted."""
        _log.info("request", request_id=request_id, tenant=tenant, outcome=reason, accepted=False)

    def request_ended(self, summary: RequestSummary) -> None:
        """Writes the line of a request that has ended."""
        request, stats = summary.request, summary.stats
        wanted = request.parameters
        facts: dict[str, object] = {
            "request_id": request.request_id,
            "tenant": request.tenant,
            "outcome": summary.outcome,
            "adapters": [f"{each.name}@{each.digest}:{each.scale:g}" for each in summary.adapters],
            "width_px": wanted.width_px,
            "height_px": wanted.height_px,
            "steps": wanted.num_inference_steps,
            "images": wanted.num_images,
            "seed": wanted.seed,
            "way": stats.way.value,
            "mean_batch_images": round(stats.mean_batch_images, 2),
            "completed_steps": stats.completed_steps,
        }
        for name in ("queue", "adapter_wait", "text_encode", "denoise", "decode", "image_encode", "total"):
            facts[f"{name}_s"] = round(getattr(stats, f"{name}_time_s"), _DIGITS)
        if request.traceparent is not None:
            facts["traceparent"] = request.traceparent
        if self._prompts:
            facts |= {"prompt": wanted.prompt, "negative_prompt": wanted.negative_prompt}
        (_log.info if summary.outcome == OK else _log.warning)("request", **facts)
