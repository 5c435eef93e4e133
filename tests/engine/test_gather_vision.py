"""Picture rows come in slot order, whatever part of a picture this rank holds."""

from types import SimpleNamespace

import torch

from ghostvis_mega.engine.pipeline import Picture, Work, gather_vision

WHOLE = torch.arange(12.0).view(4, 3)


def picture(rows: list[int] | None) -> Picture:
    index = None if rows is None else torch.tensor(rows)
    return Picture(WHOLE.clone() if index is None else WHOLE[index], index)


def gather(
    slots: list[tuple[int, list[int] | None]], pictures: dict[int, Picture]
) -> torch.Tensor | None:
    rows = tuple(None if own is None else torch.tensor(own, dtype=torch.int64) for _, own in slots)
    inputs = SimpleNamespace(slot_rows=rows)
    return gather_vision(Work(inputs, tuple(image for image, _ in slots)), pictures)


def test_whole_pictures_follow_each_other() -> None:
    found = gather([(7, None), (9, None), (7, None)], {7: picture(None), 9: picture(None)})
    assert torch.equal(found, torch.cat([WHOLE] * 3))


def test_a_slot_shows_its_own_rows_of_what_both_slots_need() -> None:
    pictures = {7: picture([0, 1, 3]), 9: picture([2])}
    found = gather([(7, [1, 3]), (9, [2]), (5, []), (7, [0])], pictures)
    assert torch.equal(found, WHOLE[[1, 3, 2, 0]])
    assert torch.equal(gather([(7, [0, 1, 3]), (9, [2])], pictures), WHOLE[[0, 1, 3, 2]])


def test_gradients_of_both_slots_add_up_in_the_leaf() -> None:
    held = picture([0, 1, 3])
    held.embedding.requires_grad_()
    found = gather([(7, [1, 3]), (7, [0, 1])], {7: held})
    (found * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])).sum().backward()
    assert held.embedding.grad[:, 0].tolist() == [100.0, 1001.0, 10.0]


def test_without_rows_there_is_nothing() -> None:
    assert gather([(5, [])], {}) is None
    assert gather([], {}) is None
