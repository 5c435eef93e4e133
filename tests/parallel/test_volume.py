"""Bytes of the exchange, against a count of every copy that is made."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostvis_mega.data.batch import SequenceLayout
from ghostvis_mega.parallel.dispatch import ImageDispatch, dispatch_images
from ghostvis_mega.parallel.exchange import EmbeddingExchange
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.image_rows import ImageRows, image_rows
from ghostvis_mega.parallel.volume import dispatch_figures, exchange_volume
from ghostvis_mega.parallel.windows import PictureWindow
from tests.parallel.test_dispatch import batches, grid
from tests.parallel.test_image_rows import TOKENS, replicas


def copies(
    dispatch: ImageDispatch, places: list[Place], *, gradients: bool
) -> tuple[list[int], list[int], int]:
    """Pictures sent and received by each rank, and those that stay, one copy at a time."""
    sent, received, local = [0] * len(places), [0] * len(places), 0
    for owner, ids in enumerate(dispatch.encode):
        for rank, place in enumerate(places):
            if place.pipeline != 0:
                continue
            for image in ids:
                if image not in dispatch.wanted[place.data]:
                    continue
                moves = [(owner, rank)]
                if gradients and place.tensor == 0:
                    moves.append((rank, owner))
                for source, target in moves:
                    local += source == target
                    sent[source] += source != target
                    received[target] += source != target
    return sent, received, local


@given(batches())
@pytest.mark.parametrize("gradients", [True, False])
def test_volume_counts_every_copy(
    gradients: bool, batch: tuple[list[list[int]], list[Place]]
) -> None:
    wanted, places = batch
    dispatch = dispatch_images(wanted, places)
    volume = exchange_volume(dispatch, places, bytes_per_image=10, gradients=gradients)
    sent, received, local = copies(dispatch, places, gradients=gradients)
    assert volume.sent.tolist() == [10 * count for count in sent]
    assert volume.received.tolist() == [10 * count for count in received]
    assert volume.local == 10 * local
    total = local + sum(sent)
    assert volume.local_share == pytest.approx(local / total if total else 0.0)


def test_the_count_sees_an_owner_that_moves() -> None:
    places = grid(data=2, pipeline=1, tensor=1)
    near = ImageDispatch(encode=((1,), (2,)), wanted=((1,), (2,)))
    far = ImageDispatch(encode=((2,), (1,)), wanted=((1,), (2,)))
    volumes = [exchange_volume(each, places, bytes_per_image=8) for each in (near, far)]
    assert [volume.local_share for volume in volumes] == [1.0, 0.0]
    assert [volume.sent.tolist() for volume in volumes] == [[0, 0], [16, 16]]


def sliced_grid(*, data: int, pipeline: int, context: int, tensor: int) -> list[Place]:
    """As `grid`, with context between tensor and data."""
    return [
        Place(data=d, pipeline=p, tensor=t, context=c)
        for p in range(pipeline)
        for d in range(data)
        for c in range(context)
        for t in range(tensor)
    ]


def exchanged_rows(
    dispatch: ImageDispatch, places: list[Place], rows: ImageRows, *, gradients: bool
) -> tuple[list[int], list[int], int]:
    """Rows sent and received by each rank, and those that stay, as the exchange itself cuts them:
    what it hands to its two all-to-alls."""
    sent, received, local = [0] * len(places), [0] * len(places), 0
    width = 2
    for rank, place in enumerate(places):
        groups: Any = SimpleNamespace(
            rank=rank, place=place, places=places, is_first_stage=place.pipeline == 0
        )
        exchange = EmbeddingExchange(dispatch, groups, rows)
        calls: list[tuple[list[int], list[int]]] = []

        def note(
            units: torch.Tensor, *, sent: list[int], received: list[int], calls: list = calls
        ) -> torch.Tensor:
            calls.append((sent, received))
            return units.new_zeros((sum(received), *units.shape[1:]))

        exchange._all_to_all = note  # type: ignore[method-assign]
        shape = (rows.tokens_per_image, width)
        got = exchange.embeddings(torch.zeros((len(exchange.own), *shape)))
        if gradients:
            exchange.gradients(got, shape_TH=shape, device=torch.device("cpu"))
        for outgoing, incoming in calls:
            local += outgoing[rank]
            sent[rank] += sum(outgoing) - outgoing[rank]
            received[rank] += sum(incoming) - incoming[rank]
    return sent, received, local


@given(replicas(), st.integers(1, 2), st.integers(1, 2))
@pytest.mark.parametrize("gradients", [True, False])
def test_volume_counts_the_rows_of_each_slice(
    gradients: bool, case: tuple[list[list[SequenceLayout]], int], pipeline: int, tensor: int
) -> None:
    layouts, context = case
    rows = image_rows(layouts, tokens_per_image=TOKENS, context=context)
    places = sliced_grid(data=len(layouts), pipeline=pipeline, context=context, tensor=tensor)
    dispatch = dispatch_images([[i for x in own for i in x.image_ids] for own in layouts], places)
    volume = exchange_volume(
        dispatch, places, bytes_per_image=8 * TOKENS, rows=rows, gradients=gradients
    )
    sent, received, local = exchanged_rows(dispatch, places, rows, gradients=gradients)
    assert volume.sent.tolist() == [8 * count for count in sent]
    assert volume.received.tolist() == [8 * count for count in received]
    assert volume.local == 8 * local


def test_a_picture_that_lies_in_one_slice_travels_to_that_slice_alone() -> None:
    places = sliced_grid(data=1, pipeline=1, context=2, tensor=1)
    dispatch = ImageDispatch(encode=((), (5,)), wanted=((5,),))
    layout = SequenceLayout(segments=(40,), image_ids=(5,), image_starts=(0,))
    rows = image_rows([[layout]], tokens_per_image=TOKENS, context=2)
    volume = exchange_volume(dispatch, places, bytes_per_image=10, rows=rows)
    assert (volume.sent.tolist(), volume.local) == ([10, 10], 0)
    # The estimate would have it cut in two.
    estimate = exchange_volume(dispatch, places, bytes_per_image=10, context=2)
    assert (estimate.sent.tolist(), estimate.local) == ([5, 5], 10)


def test_without_rows_context_parallel_ranks_are_taken_to_share_a_picture() -> None:
    places = grid(data=1, pipeline=1, tensor=1) * 2
    dispatch = ImageDispatch(encode=((5,), ()), wanted=((5,),))
    volume = exchange_volume(dispatch, places, bytes_per_image=8, context=2)
    # Half stays, half goes over and comes back.
    assert volume.sent.tolist() == [4, 4]
    assert volume.received.tolist() == [4, 4]
    assert volume.local == 8


def test_figures_of_a_step() -> None:
    places = grid(data=2, pipeline=1, tensor=1)
    dispatch = dispatch_images([[1, 2, 3], []], places)
    run: Any = SimpleNamespace(
        model=SimpleNamespace(
            vision=object(), tokens_per_image=4, llm=SimpleNamespace(hidden_size=8)
        ),
        trained_modules=("llm", "projector"),
    )

    def window(dispatch: ImageDispatch, rows: ImageRows | None = None) -> PictureWindow:
        return PictureWindow(1, dispatch, torch.zeros(0, 3, 4, 4, dtype=torch.uint8), rows)

    figures = dispatch_figures([window(dispatch)], run, places)
    assert figures == {
        "imbalance": pytest.approx(4 / 3),
        "sent_mean": 128.0,
        "sent_max": 128.0,
        "received_max": 128.0,
        "local_share": pytest.approx(2 / 3),
    }
    layouts = [SequenceLayout(segments=(8,), image_ids=(i,), image_starts=(0,)) for i in (1, 2, 3)]
    rows = image_rows([layouts, []], tokens_per_image=4, context=1)
    assert dispatch_figures([window(dispatch, rows)], run, places) == figures
    # Of two windows the bytes add up; the busiest rank of each counts.
    other = dispatch_images([[], [4]], places)
    both = dispatch_figures([window(dispatch), window(other)], run, places)
    assert both["sent_mean"] == 128.0 and both["imbalance"] == pytest.approx((2 + 1) * 2 / 4)
    run.trained_modules = ("llm",)
    assert dispatch_figures([window(dispatch)], run, places)["sent_mean"] == 64.0
    run.model.vision = None
    assert dispatch_figures([window(dispatch)], run, places) == {}
