"""Bindings are of files: whatever way leads to them, on a true disk, and through whatever selector."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lora_server.adapters.hub import Hub, HubPath, not_on_hub
from lora_server.adapters.manager import AdapterManager
from lora_server.adapters.roots import AdapterRoots
from lora_server.adapters.source import HUB_SCHEME, UPLOAD_SCHEME
from lora_server.adapters.store import ContentStore, FileEntry, not_in_store
from lora_server.adapters.tenants import HubGrants
from lora_server.config import CacheConfig, ServerConfig
from lora_server.errors import AdapterSourceForbiddenError, AdapterSourceNotFoundError, LoraServerError
from lora_server.types import AdapterSource, AdapterUse, ByName, Viewer
from pydantic import ValidationError

from tests.fake_hub import FakeHub, serving_hub
from tests.stateful.file_loader import FileLoader

ACME = frozenset({"acme"})


@dataclass
class House:
    """A manager, its first root, and its store."""

    manager: AdapterManager
    root: Path
    store: ContentStore

    def bind(self, path: str, name: str | None = None) -> None:
        """An operator binds a source to acme."""
        self.manager.load(AdapterSource(path, name=name), tenants=ACME).result(20)

    def use(self, path: str, tenant: str = "umbrella", name: str | None = None) -> str:
        """A tenant's use by a source; the name."""
        return self.draw(AdapterUse(AdapterSource(path, name=name)), tenant)

    def draw(self, use: AdapterUse, tenant: str = "umbrella") -> str:
        """Resolves and leases."""
        found = self.manager.resolve([use], tenant).result(20)
        self.manager.acquire(found).result(20).release()
        return found[0].applied.name

    def refused(self, path: str, tenant: str = "umbrella") -> LoraServerError:
        """The error of a use that must fail."""
        with pytest.raises(LoraServerError) as caught:
            self.use(path, tenant)
        return caught.value


def write(folder: Path, text: str, *components: str) -> None:
    """A PEFT folder with sub-folders of components."""
    for place in (folder, *(folder / each for each in components)):
        place.mkdir(parents=True, exist_ok=True)
        (place / "adapter_config.json").write_text("{}")
        (place / "adapter_model.safetensors").write_text(f"{text} {place.name}")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """Two roots, one of them a view of the other, with a folder of two components, a file among others, and a store."""
    root, view, state = tmp_path / "root", tmp_path / "view", tmp_path / "state"
    root.mkdir()
    view.mkdir()
    store = ContentStore(state)
    roots = AdapterRoots([root, view], {UPLOAD_SCHEME: store.place}, own=[store.root])
    write(root / "brand", "b", "transformer", "text_encoder")
    write(root / "open", "o", "transformer")
    (root / "flat").mkdir()
    for name in ("secret", "public"):
        (root / "flat" / f"{name}.safetensors").write_text(name)
    manager = AdapterManager(CacheConfig(budget_bytes=10_000, device_slots=8), FileLoader(roots), store=store)
    yield House(manager, root, store)
    manager.check_integrity()
    manager.close()


def hard_link(house: House, source: Path, name: str) -> str:
    """The same file under another name."""
    folder = house.root / name
    folder.mkdir()
    os.link(source, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return str(folder)


def symbolic(house: House, target: Path, name: str) -> str:
    """A link in the root."""
    (house.root / name).symlink_to(target)
    return name


def linked_file(house: House, target: Path, name: str) -> str:
    """A folder of its own, in which the weights are a link."""
    folder = house.root / name
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").symlink_to(target)
    return str(folder)


WAYS: dict[str, Callable[[House], str]] = {
    "itself": lambda house: str(house.root / "brand"),
    "relative": lambda _: "brand",
    "other spelling": lambda house: f"{house.root}//./brand/",
    "a component": lambda house: str(house.root / "brand" / "transformer"),
    "another component, relative": lambda _: "./brand/text_encoder/",
    "a file": lambda house: str(house.root / "brand" / "adapter_model.safetensors"),
    "a component's file": lambda _: "brand/transformer/adapter_model.safetensors",
    "the folder above": lambda house: str(house.root),
    "a link": lambda house: symbolic(house, house.root / "brand", "link"),
    "a link to a component": lambda house: symbolic(house, house.root / "brand" / "transformer", "link"),
    "through a linked folder": lambda house: f"{symbolic(house, house.root, 'up')}/brand/transformer",
    "linked weights": lambda house: linked_file(house, house.root / "brand" / "adapter_model.safetensors", "weights"),
    "linked weights of a component": lambda house: linked_file(
        house, house.root / "brand" / "transformer" / "adapter_model.safetensors", "weights"
    ),
    "a hard link": lambda house: hard_link(house, house.root / "brand" / "adapter_model.safetensors", "hard"),
    "what is no adapter there": lambda house: str(house.root / "brand" / "adapter_config.json"),
    "what is not there": lambda house: str(house.root / "brand" / "none"),
    "`..`": lambda _: "open/../brand",
}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("first", ["bind", "use"])
def test_a_binding_covers_every_way_to_its_files(house: House, how: str, first: str) -> None:
    """For others each is as a path that leads nowhere; acme gets there. It does not matter which came first."""
    path = WAYS[how](house)
    (house.root / "adapter_model.safetensors").write_text("top")
    (house.root / "adapter_config.json").write_text("{}")
    usable = how not in ("what is no adapter there", "what is not there", "`..`")
    if first == "use" and usable:
        assert house.use(path, name="before") == "before"
    house.bind(str(house.root / "brand"), "brand")
    error = house.refused(path)
    assert error.reason == ("ADAPTER_SOURCE_FORBIDDEN" if how == "`..`" else "ADAPTER_SOURCE_NOT_FOUND")
    if how != "`..`":
        assert (str(error), error.metadata) == (str(AdapterSourceNotFoundError(path)), {"path": path})
    if first == "use" and usable:
        with pytest.raises(LoraServerError):
            house.draw(AdapterUse(ByName("before")))
    if usable:
        house.use(path, "acme")
    assert house.use(str(house.root / "open")) == "open"


@pytest.mark.parametrize("bound", ["brand/transformer", "brand/adapter_model.safetensors", "brand/transformer/"])
def test_what_holds_bound_files_is_bound(house: House, bound: str) -> None:
    """The folder is read with its components; so is a name that an operator has given it before, or gives it later."""
    house.manager.load(AdapterSource("brand", name="before")).result(20)
    house.bind(bound)
    house.manager.load(AdapterSource("brand", name="later")).result(20)
    for use in (AdapterUse(AdapterSource("brand")), AdapterUse(ByName("before")), AdapterUse(ByName("later"))):
        with pytest.raises(LoraServerError):
            house.draw(use)
        house.draw(use, "acme")
    assert house.manager.list(Viewer("umbrella", is_operator=False)) == ()


def test_a_bound_file_leaves_those_beside_it_open(house: House) -> None:
    """And what says which files there are in the folder does not name it."""
    house.bind("flat/secret.safetensors")
    assert house.use("flat/public.safetensors") == "public.safetensors"
    (house.root / "empty").mkdir()
    for folder in ("flat", "empty", "none"):
        assert str(house.refused(folder)) == str(AdapterSourceNotFoundError(folder))
    assert str(house.refused("flat/secret.safetensors")) == str(AdapterSourceNotFoundError("flat/secret.safetensors"))


def test_another_mount_of_a_bound_folder_is_bound(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind mount is the same folder by its inode; here a copy whose stats say so."""
    view = house.root.parent / "view"
    shutil.copytree(house.root / "brand", view / "brand")
    true_stat = os.stat

    def stat(path: object, *args: object, **options: object) -> os.stat_result:
        return true_stat(str(path).replace(str(view), str(house.root)), *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("lora_server.adapters.places.os.stat", stat)
    assert house.use(str(view / "brand" / "transformer"), name="before") == "before"
    house.bind(str(house.root / "brand"))
    for path in ("brand", "brand/transformer", "brand/adapter_model.safetensors"):
        assert house.refused(str(view / path)).reason == "ADAPTER_SOURCE_NOT_FOUND"
    with pytest.raises(LoraServerError):
        house.draw(AdapterUse(ByName("before")))


def test_a_copy_is_another_adapter(house: House) -> None:
    """Equal bytes at a place of their own are not bound: who has them there has them."""
    house.bind("brand")
    shutil.copytree(house.root / "brand", house.root / "copy")
    assert house.use("copy") == "copy"


def push(house: House, data: bytes) -> str:
    """Stores a bare file; its digest."""
    from hashlib import sha256

    entry = FileEntry("a.safetensors", len(data), sha256(data).hexdigest())
    with house.store.begin("a", [entry], bare=True) as incoming:
        incoming.write(0, 0, data)
        return incoming.commit()


def test_uploads_of_others_cannot_be_told_from_none(house: House) -> None:
    """By digest, and by any path into the server's own folder, whether something lies there or not."""
    digest, none = push(house, b"mine"), f"sha256:{'0' * 64}"
    house.bind(UPLOAD_SCHEME + digest, "upload")
    house.store.release(digest)
    for each in (digest, none):
        error = house.refused(UPLOAD_SCHEME + each)
        assert (str(error), error.metadata) == (str(not_in_store(each)), {"path": each})
    place = house.store.place(digest)
    missing = place.parent / "missing.safetensors"
    relative = os.path.relpath(place, house.store.root)
    for path in (place, place.parent, missing, house.store.root, house.store.root / "none"):
        for viewer in ("umbrella", "acme"):
            error = house.refused(str(path), viewer)
            assert str(error) == str(AdapterSourceForbiddenError(str(path)))
    assert house.refused(relative).reason == "ADAPTER_SOURCE_NOT_FOUND"
    assert house.use(UPLOAD_SCHEME + digest, "acme") == "upload"


@pytest.fixture
def hub_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[House, FakeHub]]:
    """A manager whose tenants may name what they are granted of a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    root, downloads = tmp_path / "root", tmp_path / "hub"
    root.mkdir()
    with serving_hub() as hub:
        files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1", "other.safetensors": b"3"}
        first = hub.push("me/style", files)
        hub.push("me/style", {**files, "adapter_model.safetensors": b"2"}, "v2")
        hub.push("me/open", {**files, "adapter_model.safetensors": b"4"})
        hub.push("you/style", {**files, "adapter_model.safetensors": b"5"})
        hub.branches["me/style"]["first"] = first
        fetcher = Hub(downloads, (), 1000, endpoint=hub.url)
        loader = FileLoader(AdapterRoots([root], {HUB_SCHEME: fetcher.fetch}, own=[downloads]))
        grants = HubGrants(["umbrella=me/*", "acme=me/style"], everything=False)
        config = CacheConfig(budget_bytes=10_000, device_slots=8)
        manager = AdapterManager(config, loader, grants=grants)
        yield House(manager, root, ContentStore(tmp_path / "state")), hub
        manager.check_integrity()
        manager.close()


def test_a_binding_is_of_the_repository(hub_house: tuple[House, FakeHub]) -> None:
    """Other revisions, other files: as if the hub had no such repository; other repositories are open."""
    house, hub = hub_house
    assert house.use("hub://me/style@v2", name="before") == "before"
    house.bind("hub://me/style@main", "bound")
    commit = hub.branches["me/style"]["main"]
    hub.push("me/style", {"a.safetensors": b"1", "b.safetensors": b"2"}, "two")
    ways = ["main", "v2", commit, "first", "two", "no-such-revision"]
    for path in (*(f"style@{way}" for way in ways), "style/other.safetensors@v2", "style/none.safetensors@v2"):
        error = house.refused(f"hub://me/{path}")
        assert (str(error), error.metadata) == (str(not_on_hub(f"hub://me/{path}")), {"path": f"hub://me/{path}"})
    for use in (AdapterUse(ByName("before")), AdapterUse(ByName("bound"))):
        with pytest.raises(LoraServerError):
            house.draw(use)
    none = house.refused("hub://me/none@main")
    assert str(none) == str(not_on_hub("hub://me/none@main"))
    house.use("hub://me/style@v2", "acme")
    assert house.use("hub://me/open@main") == "open"
    downloads = house.root.parent / "hub" / "me--style" / commit
    for path in (downloads, downloads.parent / "none"):
        assert str(house.refused(str(path), "acme")) == str(AdapterSourceForbiddenError(str(path)))


def test_what_is_not_granted_is_refused_before_the_hub_is_asked(hub_house: tuple[House, FakeHub]) -> None:
    """In the same words whether there is such a repository or not; operators may load it."""
    house, hub = hub_house
    hub.requests.clear()
    errors = {
        str(house.refused(f"hub://{repo}@main", tenant)).replace(repo, "REPO")
        for repo, tenant in (
            ("you/style", "umbrella"),
            ("you/none", "umbrella"),
            ("me/open", "acme"),
            ("me/o", "third"),
        )
    }
    assert len(errors) == 1
    assert "--hub-grant" in errors.pop()
    assert not hub.requests
    house.manager.load(AdapterSource("hub://you/style@main", name="yours")).result(20)
    assert house.draw(AdapterUse(ByName("yours"))) == "yours", "what an operator has loaded is there by its name"


def test_a_repository_that_has_moved_is_named_by_its_new_name(
    hub_house: tuple[House, FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub follows old names; a binding, or a grant, of the new one would not hold for the old one."""
    house, hub = hub_house
    hub.commits["me/old"], hub.branches["me/old"] = hub.commits["me/style"], hub.branches["me/style"]
    hub.moved["me/old"] = "me/style"
    for revision in ("main", hub.branches["me/style"]["main"]):
        error = house.refused(f"hub://me/old@{revision}")
        assert str(error) == str(not_on_hub(f"hub://me/old@{revision}"))


@pytest.mark.parametrize(
    ("grants", "everything", "tenant", "repository", "admitted"),
    [
        ([], True, "acme", "me/x", True),
        ([], False, "acme", "me/x", False),
        ([], False, None, "me/x", True),
        (["acme=me/*"], True, "acme", "me/x", True),
        (["acme=me/*"], True, "acme", "ME/X", True),
        (["acme=me/*"], True, "acme", "me2/x", False),
        (["acme=me/*"], True, "umbrella", "me/x", False),
        (["*=me/open-*"], False, "umbrella", "me/open-x", True),
        (["*=me/open-*"], False, "umbrella", "me/x", False),
        (["acme=*/x"], False, "acme", "a/x", True),
        (["acme=*/x"], False, "acme", "a/b/x", False),
        (["acme=*"], False, "acme", "a/b", False),
    ],
)
def test_grants(grants: list[str], everything: bool, tenant: str | None, repository: str, admitted: bool) -> None:
    """A pattern stays within its part of a name, and is for its tenant only."""
    assert HubGrants(grants, everything=everything).admits(tenant, repository) is admitted


@pytest.mark.parametrize("grant", ["me/*", "acme=me", "acme=", "=me/*", "a b=me/*", "acme=me/*/x", "acme=me/[a-z]"])
def test_bad_grants_are_refused_at_the_start(grant: str) -> None:
    """One that can never hold, too: without the hub."""
    with pytest.raises(ValidationError, match="TENANT=OWNER/NAME"):
        ServerConfig(allow_hub=True, hub_grants=(grant,))
    with pytest.raises(ValidationError, match="--allow-hub"):
        ServerConfig(hub_grants=("acme=me/*",))


def test_repositories_of_all_spellings_are_one() -> None:
    """What is bound is found out from the path that a client may have spelled in any way."""
    from lora_server.adapters.places import repository_of

    for path in ("Me/Style@main", "me/STYLE/a/b.safetensors@x/y", "me/style@refs/pr/1"):
        assert repository_of(HUB_SCHEME + path) == "me/style"
        HubPath.parse(path)
