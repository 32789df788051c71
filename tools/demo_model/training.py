"""A training loop that fills its time: a fixed number of minutes, a learning rate that follows the clock.

On CUDA the whole step (sampling, forward, backward, clipping, AdamW, EMA) is captured in one
CUDA graph: at this model's size an eager step is nothing but launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WORK_FOLDER = ".demo-work"


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    Attributes:
        minutes: Of this run.
        peak_rate: The highest learning rate.
        begin, end: Which part of the whole schedule this run is, 0 to 1; for a training in several runs.
        ema_decay: Of the averaged weights; 0 for none.
    """

    minutes: float
    peak_rate: float
    begin: float = 0.0
    end: float = 1.0
    ema_decay: float = 0.0

    def rate(self, elapsed_s: float) -> float:
        """Learning rate: a short linear rise, then half a cosine down to zero."""
        share = min(1.0, elapsed_s / (self.minutes * 60))
        progress = self.begin + (self.end - self.begin) * share
        rise = 0.03
        if progress < rise:
            return self.peak_rate * (progress / rise + 0.01)
        return self.peak_rate * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (progress - rise) / (1 - rise)))))


def train(loss: Callable[[], Tensor], modules: Iterable[nn.Module], plan: Plan, label: str) -> list[Tensor]:
    """Minimises *loss*, which draws its own batch; returns the averaged weights of all trainable parameters, in order.

    Without an EMA the returned tensors are the parameters themselves.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    rate = torch.tensor(0.0, device=device)
    on_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=on_cuda, capturable=on_cuda
    )
    averaged = [p.detach().clone() for p in parameters] if plan.ema_decay else parameters

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        if plan.ema_decay:
            torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - plan.ema_decay)
        return value.detach()

    began_s = time.monotonic()
    run = _prepare(step) if on_cuda else step
    print(f"{label}: ready after {time.monotonic() - began_s:.0f} s", flush=True)
    _loop(run, rate, plan, label)
    return averaged


def load_averaged(modules: Iterable[nn.Module], averaged: list[Tensor]) -> None:
    """Puts the averaged weights into the trainable parameters."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(parameters, averaged, strict=True):
            parameter.copy_(value)


def _loop(run: Callable[[], Tensor], rate: Tensor, plan: Plan, label: str) -> None:
    began_s = reported_s = time.monotonic()
    steps = 0
    while (elapsed_s := time.monotonic() - began_s) < plan.minutes * 60:
        rate.fill_(plan.rate(elapsed_s))
        value = run()
        steps += 1
        if steps % 50 == 0:
            current = float(value)  # waits for the device, so that the clock is honest
            if time.monotonic() - reported_s > 20:
                reported_s = time.monotonic()
                print(f"{label}: {elapsed_s:5.0f} s, step {steps}, loss {current:.4f}", flush=True)
    print(f"{label}: {steps} steps in {time.monotonic() - began_s:.0f} s, loss {float(value):.4f}", flush=True)


def _prepare(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Compiles and captures; what the compiler cannot do runs eagerly in the graph."""
    try:
        return _capture(step)
    except Exception as error:
        print(f"no compilation ({type(error).__name__}: {error})", flush=True)
        torch.compiler.set_stance("force_eager")
        return _capture(step)


def _capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Warms *step* up on a side stream and captures it; falls back to eager steps, and says so."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = step()
    except RuntimeError as error:
        print(f"no CUDA graph ({error}); stepping eagerly", flush=True)
        torch.cuda.synchronize()
        return step

    def replay() -> Tensor:
        graph.replay()
        return value

    return replay


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Compiles on CUDA; on the CPU, where a smoke run is all there is, leaves it alone."""
    return torch.compile(function) if device.type == "cuda" else function


def pick_device() -> torch.device:
    """CUDA if there is one; sets TF32 on it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")
