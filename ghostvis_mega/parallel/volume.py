"""What the exchange of embeddings moves, computed from a dispatch alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.parallel.dispatch import ImageDispatch
from ghostvis_mega.parallel.groups import Place


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
    context: int = 1,
    gradients: bool = True,
) -> ExchangeVolume:
    """Bytes that each rank sends and receives for a batch.

    Each first-stage rank of a replica gets the embeddings of the replica's pictures; the gradients
    go back from tensor rank 0 alone. Of context-parallel ranks each gets the rows of its slice,
    which are taken to be an equal part of every picture.

    Args:
        dispatch: Owners and needs.
        places: Coordinates of every rank.
        bytes_per_image: Of one picture's embeddings as they travel.
        context: Context-parallel degree.
        gradients: Whether gradients go back, because a part of the vision side trains.
    """
    data_of = np.array([place.data for place in places])
    first = np.array([place.pipeline == 0 for place in places])
    owners, replicas = _pairs(dispatch)
    embeddings = _one_way(owners, replicas, data_of, first)
    parts = [embeddings]
    if gradients:
        senders = first & np.array([place.tensor == 0 for place in places])
        back = _one_way(owners, replicas, data_of, senders)
        parts.append((back[1], back[0], back[2]))
    each = bytes_per_image / context
    return ExchangeVolume(
        sent=each * sum(part[0] for part in parts),
        received=each * sum(part[1] for part in parts),
        local=each * sum(part[2] for part in parts),
    )


def embedding_bytes(*, tokens_per_image: int, hidden_size: int) -> int:
    """Bytes of one picture's embeddings on their way: fp32."""
    return 4 * tokens_per_image * hidden_size


def dispatch_figures(
    dispatch: ImageDispatch, run: RunConfig, places: Sequence[Place]
) -> dict[str, float]:
    """What a step reports of its dispatch (`StepMetrics.dispatch`); empty for a text model."""
    if run.model.vision is None:
        return {}
    volume = exchange_volume(
        dispatch,
        places,
        bytes_per_image=embedding_bytes(
            tokens_per_image=run.model.tokens_per_image, hidden_size=run.model.llm.hidden_size
        ),
        context=run.parallel.context,
        gradients=any(module != "llm" for module in run.trained_modules),
    )
    return {
        "imbalance": dispatch.imbalance(),
        "sent_mean": float(volume.sent.mean()),
        "sent_max": float(volume.sent.max()),
        "received_max": float(volume.received.max()),
        "local_share": volume.local_share,
    }


def _pairs(dispatch: ImageDispatch) -> tuple[np.ndarray, np.ndarray]:
    """Owner and replica of every picture that a replica wants, int64 each."""
    ids = np.array([i for own in dispatch.encode for i in own], dtype=np.int64)
    owner = np.repeat(np.arange(len(dispatch.encode)), [len(own) for own in dispatch.encode])
    order = np.argsort(ids)
    wanted = np.array([i for want in dispatch.wanted for i in want], dtype=np.int64)
    replicas = np.repeat(np.arange(len(dispatch.wanted)), [len(w) for w in dispatch.wanted])
    return owner[order][np.searchsorted(ids[order], wanted)], replicas


def _one_way(
    owners: np.ndarray, replicas: np.ndarray, data_of: np.ndarray, readers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Pictures that owners give to the `readers` among the ranks of each replica.

    Returns:
        int64 [ranks] given to others, int64 [ranks] got from others, and those that stay.
    """
    num_readers = np.bincount(data_of[readers], minlength=int(data_of.max()) + 1)
    wanted = np.bincount(replicas, minlength=len(num_readers))
    stays = readers[owners] & (data_of[owners] == replicas)
    own = np.bincount(owners[stays], minlength=len(data_of))
    given = np.bincount(owners, weights=num_readers[replicas], minlength=len(data_of))
    got = np.where(readers, wanted[data_of] - own, 0)
    return given.astype(np.int64) - own, got, int(own.sum())
