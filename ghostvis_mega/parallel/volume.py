"""What the exchange of embeddings moves, computed from a dispatch alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.parallel.dispatch import ImageDispatch, imbalance
from ghostvis_mega.parallel.groups import Place
from ghostvis_mega.parallel.image_rows import ImageRows
from ghostvis_mega.parallel.windows import PictureWindow


@dataclass(frozen=True)
class ExchangeVolume:
    """Bytes of one step, embeddings and gradients together."""

    sent: np.ndarray
    """float64 [ranks]: bytes that leave each rank for another one."""
    received: np.ndarray
    """float64 [ranks]: bytes that reach each rank from another one."""
    local: float
    """Bytes that stay on their rank."""

    @property
    def local_share(self) -> float:
        """Share of all bytes that need not travel; 0.0 where there is nothing to move."""
        total = self.local + float(self.sent.sum())
        return self.local / total if total else 0.0


def exchange_volume(
    dispatch: ImageDispatch,
    places: Sequence[Place],
    *,
    bytes_per_image: int,
    rows: ImageRows | None = None,
    context: int = 1,
    gradients: bool = True,
) -> ExchangeVolume:
    """Bytes that each rank sends and receives for a batch.

    Each first-stage rank of a replica gets the embeddings of the replica's pictures; the gradients
    go back from tensor rank 0 alone. Of context-parallel ranks each gets the rows of its slice:
    exactly those of `rows`, or by an estimate, where nobody has cut the sequences, an equal part of
    every picture.

    Args:
        dispatch: Owners and needs.
        places: Coordinates of every rank.
        bytes_per_image: Of one picture's embeddings as they travel.
        rows: What each context-parallel rank needs; None without context parallelism, or for the
            estimate.
        context: Context-parallel degree of the estimate.
        gradients: Whether gradients go back, because a part of the vision side trains.
    """
    parts_of, owners, readers, units = _needs(dispatch, places, rows)
    first = np.array([place.pipeline == 0 for place in places])
    embeddings = _one_way(owners, readers, units, parts_of, first)
    parts = [embeddings]
    if gradients:
        senders = first & np.array([place.tensor == 0 for place in places])
        back = _one_way(owners, readers, units, parts_of, senders)
        parts.append((back[1], back[0], back[2]))
    each = bytes_per_image / (context if rows is None else rows.tokens_per_image)
    return ExchangeVolume(
        sent=each * sum(part[0] for part in parts),
        received=each * sum(part[1] for part in parts),
        local=each * sum(part[2] for part in parts),
    )


def embedding_bytes(*, tokens_per_image: int, hidden_size: int) -> int:
    """Bytes of one picture's embeddings on their way: fp32."""
    return 4 * tokens_per_image * hidden_size


def dispatch_figures(
    windows: Sequence[PictureWindow], run: RunConfig, places: Sequence[Place]
) -> dict[str, float]:
    """What a step reports of its dispatch (`StepMetrics.dispatch`); empty for a text model.

    Args:
        windows: Of the step.
        run: Settings.
        places: Coordinates of every rank.
    """
    if run.model.vision is None:
        return {}
    size = embedding_bytes(
        tokens_per_image=run.model.tokens_per_image, hidden_size=run.model.llm.hidden_size
    )
    volumes = [
        exchange_volume(
            window.dispatch,
            places,
            bytes_per_image=size,
            rows=window.image_rows,
            gradients=any(module != "llm" for module in run.trained_modules),
        )
        for window in windows
    ]
    volume = ExchangeVolume(
        sent=np.sum([each.sent for each in volumes], axis=0),
        received=np.sum([each.received for each in volumes], axis=0),
        local=sum(each.local for each in volumes),
    )
    return {
        "imbalance": imbalance([window.dispatch for window in windows]),
        "sent_mean": float(volume.sent.mean()),
        "sent_max": float(volume.sent.max()),
        "received_max": float(volume.received.max()),
        "local_share": volume.local_share,
    }


def _needs(
    dispatch: ImageDispatch, places: Sequence[Place], rows: ImageRows | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Who needs what of whom. A part is what ranks read alike: a replica, or with `rows` one
    context-parallel slice of a replica.

    Returns:
        int64 [ranks] part of every rank; and for every picture that a part needs, int64 each: its
        owner, the part, and the units that the part needs (pictures, or with `rows` rows).
    """
    if rows is None:
        needs = [dict.fromkeys(ids, 1) for ids in dispatch.wanted]
        parts_of = [place.data for place in places]
    else:
        slices = len(rows.needed[0])
        needs = [
            {image: len(own) for image, own in of_slice.items()}
            for replica in rows.needed
            for of_slice in replica
        ]
        parts_of = [place.data * slices + place.context for place in places]
    ids = np.array([i for own in dispatch.encode for i in own], dtype=np.int64)
    owner = np.repeat(np.arange(len(dispatch.encode)), [len(own) for own in dispatch.encode])
    order = np.argsort(ids)
    wanted = np.array([i for need in needs for i in need], dtype=np.int64)
    units = np.array([n for need in needs for n in need.values()], dtype=np.int64)
    readers = np.repeat(np.arange(len(needs)), [len(need) for need in needs])
    return np.array(parts_of), owner[order][np.searchsorted(ids[order], wanted)], readers, units


def _one_way(
    owners: np.ndarray,
    readers: np.ndarray,
    units: np.ndarray,
    parts_of: np.ndarray,
    reading: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Units that owners give to the ranks of each part that are `reading`.

    Returns:
        int64 [ranks] given to others, int64 [ranks] got from others, and those that stay.
    """
    num_ranks, num_parts = len(parts_of), int(parts_of.max()) + 1
    num_reading = np.bincount(parts_of[reading], minlength=num_parts)
    wanted = np.bincount(readers, weights=units, minlength=num_parts)
    stays = reading[owners] & (parts_of[owners] == readers)
    own = np.bincount(owners[stays], weights=units[stays], minlength=num_ranks)
    given = np.bincount(owners, weights=units * num_reading[readers], minlength=num_ranks)
    got = np.where(reading, wanted[parts_of] - own, 0)
    return (given - own).astype(np.int64), got.astype(np.int64), int(own.sum())
