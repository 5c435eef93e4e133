"""The CPU set: enough layouts, all allowed, every legal pair of values in some layout."""

from itertools import product
from pathlib import Path

import pytest

from ghostvis_mega.config import deepspeed, rules
from ghostvis_mega.perf.certify.covering import (
    all_pairs,
    complete,
    cover,
    legal_pairs,
    most_telling,
    pairs_of,
)
from ghostvis_mega.perf.certify.cpu_layouts import (
    DIMENSIONS,
    FEWER,
    build,
    choices,
    cpu_layouts,
    few_cpu_layouts,
    legal,
)
from ghostvis_mega.perf.certify.layout import Layout
from ghostvis_mega.perf.certify.problem import run_of

NAMES = {name: list(values) for name, values in DIMENSIONS.items()}


def problems_of(layout: Layout, folder: Path) -> list[str]:
    run = run_of(layout, folder)
    return [
        *rules.find_problems(run, world_size=layout.ranks, device="cpu"),
        *deepspeed.find_problems(run, world_size=layout.ranks),
    ]


def test_layouts_are_many_and_differ(tmp_path: Path) -> None:
    layouts = cpu_layouts()
    names = [layout.name for layout in layouts]
    assert len(set(names)) == len(names)
    runs = [run_of(layout, tmp_path).model_dump_json() + layout.kind for layout in layouts]
    assert len({(run, layout.ranks) for run, layout in zip(runs, layouts, strict=True)}) == len(
        runs
    )


def test_every_layout_is_allowed(tmp_path: Path) -> None:
    found = {layout.name: problems_of(layout, tmp_path) for layout in cpu_layouts()}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_every_legal_pair_occurs() -> None:
    for dimensions in (DIMENSIONS, FEWER):
        names = {name: list(values) for name, values in dimensions.items()}
        occurring = set().union(*map(pairs_of, choices(dimensions)))
        assert occurring == legal_pairs(names, legal)


def test_pairs_left_out_are_refused_or_mean_nothing(tmp_path: Path) -> None:
    """No legal combination hides behind `legal`: what it forbids, the rules refuse."""
    engines = ("zero", "vision_zero", "frozen")
    for one, value, two, other in set(all_pairs(NAMES)) - legal_pairs(NAMES, legal):
        if one in engines and two in engines:
            continue  # an engine for a frozen part, or none for a trained one
        start = {one: value, two: other}
        whole = complete(NAMES, lambda choice: True, start)
        assert whole is not None
        assert problems_of(build(DIMENSIONS, whole, ranks=4), tmp_path), start


def test_quick_layouts_show_every_value() -> None:
    picked = most_telling(choices(DIMENSIONS), 20)
    shown = set().union(*(choice.items() for choice in picked))
    assert shown == {(name, value) for name, values in NAMES.items() for value in values}
    names = {layout.name for layout in few_cpu_layouts(20)}
    assert len(names) == 20
    assert names <= {layout.name for layout in cpu_layouts()}


@pytest.mark.parametrize("sizes", [(2, 3, 4), (5, 5, 2, 2), (4, 4, 4, 4, 4)])
def test_cover_by_definition(sizes: tuple[int, ...]) -> None:
    """Against all combinations: a pair counts as legal exactly if some legal whole holds it."""
    dimensions = {f"d{i}": [f"d{i}v{v}" for v in range(n)] for i, n in enumerate(sizes)}

    def allowed(choice: dict[str, str]) -> bool:
        # A rule of three values, so that pairs become impossible only together with others.
        return not (
            choice.get("d0") == "d0v0"
            and choice.get("d1") in ("d1v0", "d1v1")
            and "d2v0" in choice.values()
        ) and not (choice.get("d0") == "d0v1" and choice.get("d1") == "d1v1")

    wholes = [
        dict(zip(dimensions, values, strict=True)) for values in product(*dimensions.values())
    ]
    possible = set().union(*(pairs_of(whole) for whole in wholes if allowed(whole)))
    rows = cover(dimensions, allowed)
    assert all(map(allowed, rows))
    assert set().union(*map(pairs_of, rows)) == possible
    assert len(rows) < len(wholes)
    # The check itself: without any one of the last rows something is missing.
    assert set().union(*map(pairs_of, rows[:-1])) != possible


def test_most_telling_takes_new_values_first() -> None:
    rows = [{"a": "1", "b": "1"}, {"a": "1", "b": "2"}, {"a": "2", "b": "3"}]
    assert most_telling(rows, 2) == [rows[0], rows[2]]
