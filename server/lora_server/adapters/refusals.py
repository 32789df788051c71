"""What is said of what is not there, and, in the same words, of what a caller must not know to be there."""

from __future__ import annotations

from lora_server.adapters.hub import not_on_hub
from lora_server.adapters.source import HUB_SCHEME, UPLOAD_SCHEME
from lora_server.adapters.store import not_in_store
from lora_server.errors import AdapterError, AdapterNotFoundError, AdapterSourceNotFoundError
from lora_server.types import AdapterSource, AdapterUse, ById, ByName


def nothing_at(source_path: str) -> AdapterSourceNotFoundError:
    """What is said of a source."""
    if source_path.startswith(UPLOAD_SCHEME):
        return not_in_store(source_path.removeprefix(UPLOAD_SCHEME))
    if source_path.startswith(HUB_SCHEME):
        return not_on_hub(source_path)
    return AdapterSourceNotFoundError(source_path)


def refusal(use: AdapterUse) -> AdapterError:
    """What is said of a use."""
    selector = use.selector
    if isinstance(selector, AdapterSource):
        return nothing_at(selector.path)
    if isinstance(selector, ByName):
        return AdapterNotFoundError(selector.name)
    return AdapterNotFoundError(selector.id if isinstance(selector, ById) else selector.digest)
