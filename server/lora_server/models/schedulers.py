"""The schedulers of diffusers that are known to work image by image, by the names that requests use.

Each is tested against its pipeline (tests/parity). What is absent keeps hidden state, draws from noise of its own or
needs libraries that the server does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_server.models.declared import Declared


@dataclass(frozen=True, slots=True)
class SchedulerKind:
    """A scheduler class and what is set beside the model's own configuration."""

    class_name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


SCHEDULERS: Mapping[str, SchedulerKind] = {
    "ddim": SchedulerKind("DDIMScheduler"),
    "ddpm": SchedulerKind("DDPMScheduler"),
    "deis": SchedulerKind("DEISMultistepScheduler"),
    "dpm2": SchedulerKind("KDPM2DiscreteScheduler"),
    "dpm2_ancestral": SchedulerKind("KDPM2AncestralDiscreteScheduler"),
    "dpmpp_2m": SchedulerKind("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": SchedulerKind(
        "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
    ),
    "dpmpp_2m_sde": SchedulerKind("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": SchedulerKind("DPMSolverSinglestepScheduler"),
    "euler": SchedulerKind("EulerDiscreteScheduler"),
    "euler_ancestral": SchedulerKind("EulerAncestralDiscreteScheduler"),
    "heun": SchedulerKind("HeunDiscreteScheduler"),
    "lcm": SchedulerKind("LCMScheduler"),
    "pndm": SchedulerKind("PNDMScheduler"),
    "unipc": SchedulerKind("UniPCMultistepScheduler"),
}
"""What a request may ask of a UNet model; the configuration is the model's own, as with diffusers' `from_config`."""

_ZERO_SNR = "rescale_betas_zero_snr"
_FLOW = "FlowMatchEulerDiscreteScheduler"


def check_scheduler(scheduler: Any) -> None:
    """Refuses a model whose own scheduler is not known to work.

    Raises:
        ValueError: If it is not; the message names those that are.
    """
    known = {_FLOW, *(kind.class_name for kind in SCHEDULERS.values())}
    name = type(scheduler).__name__
    if name not in known:
        raise ValueError(f"its scheduler is a {name}; this server knows {', '.join(sorted(known))}")


def supported(own: Any) -> tuple[str, ...]:
    """Returns the names that requests may use of a model whose own scheduler is *own*.

    A network that was trained to zero terminal SNR is no business of a scheduler that cannot end there.
    """
    import diffusers

    if not own.config.get(_ZERO_SNR):
        return tuple(SCHEDULERS)
    return tuple(name for name, kind in SCHEDULERS.items() if _takes(getattr(diffusers, kind.class_name), _ZERO_SNR))


def as_declared(own: Any, said: Declared) -> Any:
    """Returns the scheduler *own*, configured as the weights say that they were trained; itself if they say nothing.

    Zero terminal SNR goes with steps that begin at the last timestep (trailing), because others never see the noise
    alone that the network was trained to begin with (Lin et al. 2023, section 3.3).

    Raises:
        ValueError: If it cannot be configured so.
    """
    changes: dict[str, Any] = {}
    if said.prediction_type not in (None, own.config.get("prediction_type")):
        changes["prediction_type"] = said.prediction_type
    if said.zero_terminal_snr:
        changes |= {_ZERO_SNR: True, "timestep_spacing": "trailing"}
    if not changes:
        return own
    if said.zero_terminal_snr and {**own.config, **changes}.get("prediction_type") == "epsilon":
        raise ValueError("its weights say zero terminal SNR (ztsnr), where noise cannot be predicted, and no v_pred")
    if lacking := [name for name in changes if not _takes(type(own), name)]:
        raise ValueError(
            f"its weights say how they were trained (ztsnr, v_pred, or the header), and its scheduler, a "
            f"{type(own).__name__}, has no {lacking[0]}: configure another, such as EulerDiscreteScheduler"
        )
    return type(own).from_config(own.config, **changes)


def choose_scheduler(own: Any, name: str | None) -> Any:
    """Returns the model's own scheduler, or the one that a request or a model's settings name, configured alike.

    Raises:
        ValueError: If there is none of that name.
    """
    if name is None:
        return own
    if name not in (names := supported(own)):
        raise ValueError(f"there is no scheduler {name!r} for this model; choose one of {', '.join(names)}")
    import diffusers

    kind = SCHEDULERS[name]
    return getattr(diffusers, kind.class_name).from_config(own.config, **kind.changes)


def _takes(scheduler_class: type[Any], setting: str) -> bool:
    return setting in inspect.signature(scheduler_class.__init__).parameters
