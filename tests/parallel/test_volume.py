"""Bytes of the exchange, against a count of every copy that is made."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given

from ghostvis_mega.parallel.dispatch import ImageDispatch, dispatch_images
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.volume import dispatch_figures, exchange_volume
from tests.parallel.test_dispatch import batches, grid


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


def test_context_parallel_ranks_share_a_picture() -> None:
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
        parallel=SimpleNamespace(context=1),
        trained_modules=("llm", "projector"),
    )
    figures = dispatch_figures(dispatch, run, places)
    assert figures == {
        "imbalance": pytest.approx(4 / 3),
        "sent_mean": 128.0,
        "sent_max": 128.0,
        "received_max": 128.0,
        "local_share": pytest.approx(2 / 3),
    }
    run.trained_modules = ("llm",)
    assert dispatch_figures(dispatch, run, places)["sent_mean"] == 64.0
    run.model.vision = None
    assert dispatch_figures(dispatch, run, places) == {}
