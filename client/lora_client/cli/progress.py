"""Progress on standard error: a live bar on a terminal, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lora_client.console import tell
from lora_client.errors import LoraClientError
from lora_client.types import Completed, Event, PromptTruncation, Queued, Stats
from lora_client.types import Progress as ProgressEvent

_PLAIN_SHARE = 0.25


def is_live(console: Console) -> bool:
    """Whether *console* can be drawn on again: a terminal that moves its cursor, so not one of TERM=dumb.

    FORCE_COLOR makes rich take a pipe for a terminal; what is drawn there would be cut.
    """
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


class ProgressDisplay:
    """Shows the events of one request. A context manager."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True)
        self._live = not quiet and is_live(self._console)
        self._plain = not quiet and not self._live
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._next_share = 0.0

    def __enter__(self) -> ProgressDisplay:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Shows one event. What was cut off a prompt is said even if quiet: it is no progress."""
        if self._live:
            self._show_live(event)
        elif self._plain:
            self._show_plain(event)
        if isinstance(event, Completed) and (self._live or self._plain):
            stats = event.stats
            tell(
                f"{stats.completed_steps} steps in {stats.denoise_time_s:.2f} s, {stats.total_time_s:.2f} s in all, "
                f"adapters: {_ways(stats)}"
            )
        if isinstance(event, Completed):
            for truncation in event.stats.prompt_truncations:
                tell(f"warning: {truncation_text(truncation)}")

    def show_wait(self, seconds: float, error: LoraClientError) -> None:
        """Says that the request is sent again in so many seconds, because of *error*."""
        text = f"the server has no room ({error.reason}); trying again in {seconds:.1f} s"
        if self._live:
            self._console.print(text, markup=False, highlight=False)
        elif self._plain:
            tell(text)

    def _show_live(self, event: Event) -> None:
        if self._task is None:
            self._task = self._bar.add_task("queued", total=None, rate="")
        if isinstance(event, Queued):
            self._bar.update(
                self._task, description=f"queued ({event.position} before)" if event.position else "starting"
            )
        elif isinstance(event, ProgressEvent):
            self._bar.update(
                self._task,
                description="denoising",
                total=event.total_steps,
                completed=event.completed_steps,
                rate=f"{event.completed_steps / max(event.elapsed_time_s, 1e-6):.1f} steps/s",
            )

    def _show_plain(self, event: Event) -> None:
        if isinstance(event, Queued) and event.position:
            tell(f"queued, {event.position} before")
        elif isinstance(event, ProgressEvent) and event.completed_steps >= self._next_share * event.total_steps:
            tell(f"step {event.completed_steps}/{event.total_steps}, {event.elapsed_time_s:.1f} s")
            self._next_share = event.completed_steps / event.total_steps + _PLAIN_SHARE


def truncation_text(truncation: PromptTruncation) -> str:
    """One line of what was cut off a prompt; what cannot be printed of it is escaped."""
    which = "negative prompt" if truncation.negative else "prompt"
    length = f"{truncation.num_tokens} tokens, of which {truncation.encoder!r} reads {truncation.max_tokens}"
    return f"the {which} has {length}; cut off: {truncation.dropped_text!r}"


def _ways(stats: Stats) -> str:
    """How adapters were applied, and beside how many images the steps were made."""
    ways = ", ".join(f"{way} {steps}" for way, steps in stats.steps_by_way.items()) or stats.way
    return f"{ways} (mean batch {stats.mean_batch_images:.1f})"
