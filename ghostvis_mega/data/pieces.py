"""Parts of samples: ranges of stored tokens that a plan puts into packs, and what lies in them.

A piece is (start, length) in stored tokens, where an image is one token. Cuts never go through the
positions of an image. Labels stay inside of a piece, and position ids begin at 0 in each.
"""

import numpy as np

from ghostvis_mega.data.dataset import Dataset, Gathered, ranges
from ghostvis_mega.data.layout import Role
from ghostvis_mega.data.order import shuffled
from ghostvis_mega.utils.errors import DataError

_CONCAT_KEY = 7


def whole(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    """The pieces that are all of `samples`: int64 [samples, 2]."""
    lengths = dataset.sample_index["tok_len"][samples].astype(np.int64)
    return np.stack([np.zeros_like(lengths), lengths], axis=1)


def piece_images(
    dataset: Dataset, samples: np.ndarray, pieces: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As `Dataset.image_ids`, of the images that lie in the pieces: ids, and how many in each.

    Args:
        samples: int64 [pieces].
        pieces: int64 [pieces, 2].
    """
    ids, counts = dataset.image_ids(samples)
    rows = ranges(dataset.sample_index["img_off"][samples].astype(np.int64), counts)
    places = dataset.image_refs["pos"][rows].astype(np.int64)
    owner = np.repeat(np.arange(len(samples)), counts)
    start, length = pieces[owner, 0], pieces[owner, 1]
    inside = (places >= start) & (places < start + length)
    return ids[inside], np.bincount(owner[inside], minlength=len(samples))


def image_positions(
    dataset: Dataset, samples: np.ndarray, pieces: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where images stand in their samples, or in pieces of these, from the index alone.

    Where the index names positions that a sample cannot have, its images count as the first tokens:
    ranks plan by the index, and all must come to the same.

    Args:
        samples: int64 [samples].
        pieces: int64 [samples, 2]; None for whole samples.

    Returns:
        int64: token positions, sample after sample, and how many images each has.
    """
    records = dataset.sample_index[samples]
    counts = records["n_images"].astype(np.int64)
    places = dataset.image_refs["pos"][ranges(records["img_off"].astype(np.int64), counts)]
    places, owner = places.astype(np.int64), np.repeat(np.arange(len(samples)), counts)
    limits = records["tok_len"].astype(np.int64)
    if pieces is not None:
        places, limits = places - pieces[owner, 0], pieces[:, 1]
        inside = (places >= 0) & (places < limits[owner])
        places, owner = places[inside], owner[inside]
        counts = np.bincount(owner, minlength=len(samples))
    wrong = places >= limits[owner]
    wrong[1:] |= (places[1:] <= places[:-1]) & (owner[1:] == owner[:-1])
    unusable = np.bincount(owner[wrong], minlength=len(samples)) > 0
    number = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.where(unusable[owner], number, places), counts


def piece_lengths(
    dataset: Dataset, samples: np.ndarray, pieces: np.ndarray, *, tokens_per_image: int
) -> np.ndarray:
    """Positions that each piece takes, images expanded: int64 [pieces]."""
    _, counts = piece_images(dataset, samples, pieces)
    return pieces[:, 1] + counts * (tokens_per_image - 1)


def piece_trained(dataset: Dataset, samples: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Labels under the loss in each piece, int64 [pieces]: all its trained tokens but a first."""
    records = dataset.sample_index[samples]
    counts = records["n_spans"].astype(np.int64)
    spans = dataset.spans[ranges(records["span_off"].astype(np.int64), counts)]
    owner = np.repeat(np.arange(len(samples)), counts)
    trained = spans["train"] != 0
    spans, owner = spans[trained], owner[trained]
    start = spans["start"].astype(np.int64)
    begin = np.maximum(start, pieces[owner, 0] + 1)
    shared = np.minimum(start + spans["len"], pieces[owner].sum(axis=1)) - begin
    shared = np.maximum(shared, 0)
    # A picture in a trained turn is no label.
    _, images = piece_images(dataset, samples[owner], np.stack([begin, shared], axis=1))
    return np.bincount(owner, weights=shared - images, minlength=len(samples)).astype(np.int64)


def cut_gathered(data: Gathered, pieces: np.ndarray) -> Gathered:
    """What lies in one piece of each gathered sample."""
    starts = np.cumsum(data.tok_lens) - data.tok_lens
    kept = ranges(starts + pieces[:, 0], pieces[:, 1])
    owner = np.repeat(np.arange(len(pieces)), data.image_counts)
    places = data.image_positions - starts[owner] - pieces[owner, 0]
    inside = (places >= 0) & (places < pieces[owner, 1])
    new_starts = np.cumsum(pieces[:, 1]) - pieces[:, 1]
    return Gathered(
        tokens=data.tokens[kept],
        trained=data.trained[kept],
        tok_lens=pieces[:, 1],
        image_counts=np.bincount(owner[inside], minlength=len(pieces)),
        image_ids=data.image_ids[inside],
        image_positions=(places + new_starts[owner])[inside],
    )


# --- samples that are longer than a sequence


def cut_long(
    dataset: Dataset, samples: np.ndarray, *, policy: str, seq_length: int, tokens_per_image: int
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of samples that do not fit.

    Args:
        policy: `truncate-at-turn` keeps the turns of a conversation up to the last answer that
            fits; `split-text` cuts documents into parts of `seq_length`.

    Returns:
        The samples of which something is kept, once for each piece, and the pieces.
    """
    owners: list[int] = []
    pieces: list[tuple[int, int]] = []
    for index in samples.tolist():
        spans, places = _spans(dataset, index), _image_places(dataset, index)
        document = bool(len(spans)) and spans["role"][0] in (Role.TEXT, Role.EOS)
        found: list[tuple[int, int]] = []
        if policy == "truncate-at-turn" and not document:
            end = _last_turn(spans, places, seq_length=seq_length, width=tokens_per_image)
            found = [(0, end)] if end else []
        elif policy == "split-text" and document:
            found = _split(int(dataset.sample_index["tok_len"][index]), seq_length)
        owners += [index] * len(found)
        pieces += found
    return np.array(owners, dtype=np.int64), np.array(pieces, dtype=np.int64).reshape(-1, 2)


def _spans(dataset: Dataset, index: int) -> np.ndarray:
    record = dataset.sample_index[index]
    start = int(record["span_off"])
    return dataset.spans[start : start + int(record["n_spans"])]


def _image_places(dataset: Dataset, index: int) -> list[int]:
    record = dataset.sample_index[index]
    start = int(record["img_off"])
    return dataset.image_refs["pos"][start : start + int(record["n_images"])].tolist()


def _last_turn(spans: np.ndarray, places: list[int], *, seq_length: int, width: int) -> int:
    """Where the last answer ends that fits with all before it; 0 if none does."""
    answers = {int(span["turn"]) for span in spans if span["role"] == Role.ASSISTANT}
    best = 0
    for turn in sorted(answers):
        last = spans[spans["turn"] == turn][-1]
        end = int(last["start"]) + int(last["len"])
        if end + sum(place < end for place in places) * (width - 1) <= seq_length:
            best = end
    return best


def _split(length: int, limit: int) -> list[tuple[int, int]]:
    """Parts of `limit`; a single token at the end would have no label, so it gets company."""
    sizes = [limit] * (length // limit)
    rest = length % limit
    if rest == 1 and limit > 2:
        sizes[-1], rest = limit - 1, 2
    sizes += [rest] if rest else []
    ends = np.cumsum(sizes).tolist()
    return [(end - size, size) for end, size in zip(ends, sizes, strict=True)]


# --- concatenation


def concat(
    dataset: Dataset, *, seq_length: int, tokens_per_image: int, segment_align: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All samples end to end in a shuffled order, cut where sequences end.

    A picture that does not fit into the rest of a sequence begins the next one.

    Returns:
        int64 [packs + 1] offsets, int64 [pieces] samples, int64 [pieces, 2].

    Raises:
        DataError: one picture alone is longer than a sequence.
    """
    if dataset.num_images and tokens_per_image > seq_length:
        raise DataError(
            f"an image takes {tokens_per_image} positions and cannot be cut, more than "
            f"seq_length={seq_length}: use longer sequences"
        )
    tok_lens = dataset.sample_index["tok_len"].tolist()
    with_images = dataset.sample_index["n_images"].astype(bool).tolist()
    owners: list[int] = []
    pieces: list[tuple[int, int]] = []
    offsets, free = [0], seq_length
    for index in shuffled(dataset.num_samples, seed, _CONCAT_KEY).tolist():
        start, end = 0, tok_lens[index]
        places = _image_places(dataset, index) if with_images[index] else []
        while start < end:
            stop, taken = _fit(start, end, places, room=free, width=tokens_per_image)
            if stop > start:
                owners.append(index)
                pieces.append((start, stop - start))
                free -= -(-taken // segment_align) * segment_align
            if stop < end or free == 0:
                offsets.append(len(owners))
                free = seq_length
            start = stop
    if offsets[-1] != len(owners):
        offsets.append(len(owners))
    return np.array(offsets), np.array(owners), np.array(pieces).reshape(-1, 2)


def _fit(start: int, end: int, places: list[int], *, room: int, width: int) -> tuple[int, int]:
    """How far tokens from `start` on go into `room` positions: (their end, positions taken)."""
    token, used = start, 0
    for place in places:
        if place < token:
            continue
        if used + (place - token) + width > room:
            stop = min(place, token + room - used)
            return stop, used + stop - token
        used += place - token + width
        token = place + 1
    stop = min(end, token + room - used)
    return stop, used + stop - token
