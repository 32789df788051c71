"""Which images step together: pure decisions from costs, and nobody starves."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_server.scheduler.costs import StepCosts
from lora_server.scheduler.pages import PageTable
from lora_server.scheduler.policy import Rules, choose_batch
from lora_server.types import ApplicationWay

SMALL, LARGE = (64, 64, 333), (128, 128, 333)
RULES = Rules(max_images=8, max_rows=16)


@dataclass(eq=False)
class Image:
    """A candidate; adapters by name, each of rank 16 at scale 1."""

    adapters: tuple[str, ...] = ()
    shape: Hashable = SMALL
    rows: int = 2
    latent_pixels: int = 1
    remaining_steps: int = 28
    behind: float = 0.0
    takes_slots: bool = True
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = self.ranks or dict.fromkeys(self.adapters, 16)

    @property
    def composition(self) -> tuple[tuple[str, float], ...]:
        return tuple((name, 1.0) for name in sorted(self.adapters))


def h200() -> StepCosts:
    """What peers.md 1 measured: at 512 px batching pays, at 1024 px the device is full at one image."""
    costs = StepCosts()
    costs.switch_s = 0.002
    for rows, small, large in ((2, 0.0121, 0.051), (8, 0.0412, 0.191), (16, 0.083, 0.382)):
        costs.observe(SMALL, rows, small, slots=False)
        costs.observe(SMALL, rows, small * 1.1, slots=True)
        costs.observe(LARGE, rows, large, slots=False)
        costs.observe(LARGE, rows, large * 1.12, slots=True)
    return costs


def choose(images: list[Image], costs: StepCosts | None = None, rules: Rules = RULES, pages: int = 8, merged=()):  # type: ignore[no-untyped-def]
    batch = choose_batch(images, rules, costs or h200(), PageTable(16, pages), merged)
    assert batch is not None
    return batch


def test_what_has_no_low_rank_form_never_uses_slots() -> None:
    """At a size where mixing pays, an adapter that can only be merged steps merged, and the others mix without it."""
    merged_only = Image(("dora",), takes_slots=False)
    mixing = [Image((name,)) for name in "abcd"]
    assert choose([merged_only]).way is ApplicationWay.MERGED
    batch = choose([merged_only, *mixing])
    assert (batch.way, batch.members) == (ApplicationWay.SLOTS, tuple(mixing))
    merged_only.behind = 1
    overdue = choose([merged_only, *mixing])
    assert (overdue.way, overdue.members) == (ApplicationWay.MERGED, (merged_only,))


def test_nothing_to_do() -> None:
    """Without images there is no batch."""
    assert choose_batch([], RULES, h200(), PageTable(16, 8), ()) is None


def test_a_lone_composition_runs_merged() -> None:
    """One image with an adapter costs what the base costs: its weights are merged."""
    assert choose([Image(("a",))]).way is ApplicationWay.MERGED


def test_the_base_needs_no_way() -> None:
    """Images without adapters are the base model, all together."""
    batch = choose([Image(), Image()])
    assert (batch.way, len(batch.members)) == (ApplicationWay.BASE, 2)


def test_at_512_px_mixed_images_share_a_batch() -> None:
    """Sixteen images, all different: they step together with open pages; from four on more gain nothing."""
    batch = choose([Image((f"a{k}",)) for k in range(16)])
    assert batch.way is ApplicationWay.SLOTS
    assert len(batch.members) >= 4


def test_base_and_adapter_rows_mix() -> None:
    """A base image does not wait for the others."""
    batch = choose([Image(("a",)), Image(), Image(("b",))])
    assert (batch.way, len(batch.members)) == (ApplicationWay.SLOTS, 3)


def test_at_1024_px_compositions_take_turns_merged() -> None:
    """Where the device is full at one image, open pages cost more than a change of weights."""
    batch = choose([Image((name,), LARGE) for name in "abcd"])
    assert (batch.way, len(batch.members)) == (ApplicationWay.MERGED, 1)


def test_merged_weights_are_kept_while_they_are_used() -> None:
    """Among equals, the composition that is in the weights goes on: no switching back and forth."""
    images = [Image((name,), LARGE) for name in "ab"]
    assert choose(images, merged=(("b", 1.0),)).members == (images[1],)


def test_one_composition_steps_together_merged() -> None:
    """Images of one composition share a batch at the price of the base model."""
    batch = choose([Image(("a",)) for _ in range(4)])
    assert (batch.way, len(batch.members)) == (ApplicationWay.MERGED, 4)


def test_shapes_do_not_mix() -> None:
    """A batch has one latent shape."""
    batch = choose([Image(shape=SMALL), Image(shape=LARGE), Image(shape=SMALL)])
    assert {image.shape for image in batch.members} == {SMALL}


@pytest.mark.parametrize("rules", [Rules(2, 16), Rules(8, 4), Rules(8, 16, max_latent_pixels=2)])
def test_bounds_of_a_batch(rules: Rules) -> None:
    """Images, rows and memory each bound a batch."""
    assert len(choose([Image() for _ in range(5)], rules=rules).members) == 2


def test_an_image_over_every_bound_steps_alone() -> None:
    """One image is always possible."""
    assert len(choose([Image(rows=99, latent_pixels=99)] * 2, rules=Rules(8, 4, 3)).members) == 1


def test_what_does_not_fit_into_the_pages_runs_merged() -> None:
    """An adapter of higher rank than all pages together has only one way."""
    batch = choose([Image(("huge",), ranks={"huge": 200})])
    assert batch.way is ApplicationWay.MERGED


def test_block_scales_run_merged_and_do_not_hold_the_others_back() -> None:
    """A composition that pages cannot hold takes a turn of its own; the others mix without it."""
    images = [Image(("a",)), Image(("b",), takes_slots=False), Image(("c",)), Image()]
    mixed = choose(images)
    assert (mixed.way, set(map(id, mixed.members))) == (ApplicationWay.SLOTS, {id(images[k]) for k in (0, 2, 3)})
    images[1].behind = 1
    assert choose(images).members == (images[1],)
    assert choose(images).way is ApplicationWay.MERGED


def test_adapters_share_the_pages() -> None:
    """Only as many different adapters step together as there are pages; others wait."""
    batch = choose([Image((f"a{k}",)) for k in range(6)], pages=3)
    assert (batch.way, len(batch.members)) == (ApplicationWay.SLOTS, 3)


def test_without_mixing_every_image_steps_by_itself() -> None:
    """The deterministic mode never opens pages."""
    batch = choose([Image(("a",)), Image(("b",))], rules=Rules(1, 16, mixes=False))
    assert (batch.way, len(batch.members)) == (ApplicationWay.MERGED, 1)


def test_an_overdue_image_goes_first() -> None:
    """Whatever the costs say."""
    late = Image(("z",), LARGE, behind=1)
    assert late in choose([*[Image() for _ in range(8)], late]).members


def test_beside_an_overdue_image_step_those_behind_and_few_of_those_ahead() -> None:
    """At 1024 px the device is full at one image: who is ahead would only slow it; at 512 px some may come along."""
    ahead = [Image(("a",), LARGE, behind=-1) for _ in range(7)]
    behind = [Image(("a",), LARGE, behind=0.1)]
    late = Image(("a",), LARGE, behind=1)
    batch = choose([*ahead, *behind, late])
    assert late in batch.members
    assert len(batch.members) <= 4  # as long again as the two that are behind
    small = [Image(("a",), behind=-1) for _ in range(7)]
    late = Image(("a",), behind=1)
    assert 1 < len(choose([*small, late]).members) <= 4


IMAGES = st.builds(
    Image,
    adapters=st.lists(st.sampled_from("abcdefgh"), max_size=3, unique=True).map(tuple),
    shape=st.sampled_from([SMALL, LARGE, (32, 32, 20)]),
    rows=st.sampled_from([1, 2]),
    takes_slots=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(
    first=st.lists(IMAGES, min_size=1, max_size=10),
    arrivals=st.lists(st.tuples(st.integers(0, 60), IMAGES), max_size=10),
    may_be_behind=st.integers(1, 6),
    seconds=st.lists(st.floats(0.001, 5.0), min_size=6, max_size=6),
    pages=st.integers(0, 4),
)
def test_nobody_is_held_up(
    first: list[Image],
    arrivals: list[tuple[int, Image]],
    may_be_behind: int,
    seconds: list[float],
    pages: int,
) -> None:
    """Among N tenants with an image each, none is behind by more than the bound, a batch and N steps."""
    costs = StepCosts()
    for place, (shape, slots) in enumerate([(s, w) for s in (SMALL, LARGE, (32, 32, 20)) for w in (False, True)]):
        costs.observe(shape, 2, seconds[place], slots=slots)
    images, most, merged = list(first), len(first) + len(arrivals), ()
    rules = Rules(max_images=3, max_rows=5)
    for step in range(120):
        images += [image for at, image in arrivals if at == step]
        batch = choose_batch(images, rules, costs, PageTable(16, pages), merged)
        assert batch is not None
        assert len({image.shape for image in batch.members}) == 1
        assert batch.way is not ApplicationWay.SLOTS or all(image.takes_slots for image in batch.members)
        merged = batch.members[0].composition if batch.way is ApplicationWay.MERGED else ()
        for image in images:
            stepped = any(image is each for each in batch.members)
            image.behind += (len(batch.members) / len(images) - stepped) / may_be_behind
            assert image.behind * may_be_behind <= may_be_behind + rules.max_images + most


def test_costs_are_interpolated_between_measurements() -> None:
    """Between two measured numbers of rows the estimate is between theirs, beyond them in proportion."""
    costs = h200()
    assert 0.0121 < costs.step_s(SMALL, 4, slots=False) < 0.0412
    assert costs.step_s(SMALL, 32, slots=False) == pytest.approx(0.166)


def test_costs_of_open_pages_follow_what_is_known() -> None:
    """A shape that was only stepped without pages is estimated by what pages cost elsewhere."""
    costs = h200()
    costs.observe("new", 2, 1.0, slots=False)
    assert 1.1 <= costs.step_s("new", 2, slots=True) <= 1.12


def test_one_stall_does_not_change_a_cost() -> None:
    """A measurement far above the estimate counts little."""
    costs = h200()
    costs.observe(SMALL, 2, 60.0, slots=False)
    assert costs.step_s(SMALL, 2, slots=False) < 0.0121 * 1.3
    assert costs.fastest_s(SMALL) == pytest.approx(0.0121)
