"""What stands in the sequences that training gets, taken from `BatchSource.micro_batch`.

Nothing is computed a second time: tokens, weights, position ids, segment borders and image places
are those of the micro-batch; only names (keys, vocabulary pieces) are looked up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.order import shuffled
from ghostvis_mega.data.plan import Algorithm, TooLong
from ghostvis_mega.utils.errors import DataError

_SHUFFLE_KEY = 5


@dataclass(frozen=True)
class TokenView:
    """One position; `target` says that the model is trained to predict this token."""

    index: int
    token: int
    position: int
    text: str
    special: bool
    target: bool


@dataclass(frozen=True)
class ImageView:
    """Positions that one image takes: [start, start + length) of the sequence."""

    index: int
    length: int
    first_position: int
    image_id: int
    width: int
    height: int
    encoding: str


@dataclass(frozen=True)
class SegmentView:
    """One segment of cu_seqlens: a sample, or the padding at the end (`sample` is None)."""

    start: int
    end: int
    first_position: int
    last_position: int
    sample: int | None
    key: str
    source: str
    answers: tuple[str, ...]
    piece: tuple[int, int] | None
    """First stored token and number of tokens, where only a part of the sample is here."""
    parts: tuple[TokenView | ImageView, ...]

    @property
    def extent(self) -> str:
        """Which part of the sample this is, for people; empty for all of it."""
        if self.piece is None:
            return ""
        first, count = self.piece
        return f" (stored tokens {first} to {first + count - 1})"

    @property
    def images(self) -> tuple[ImageView, ...]:
        """Images of the segment."""
        return tuple(part for part in self.parts if isinstance(part, ImageView))

    @property
    def targets(self) -> tuple[TokenView, ...]:
        """Tokens under the loss."""
        return tuple(p for p in self.parts if isinstance(p, TokenView) and p.target)


@dataclass(frozen=True)
class PackView:
    """One packed sequence."""

    number: int
    seq_length: int
    cu_seqlens: tuple[int, ...]
    max_seqlen: int
    weight: float
    segments: tuple[SegmentView, ...]
    used: int
    """Positions that are not padding."""

    @property
    def images(self) -> tuple[ImageView, ...]:
        """Images in order of their places."""
        return tuple(image for segment in self.segments for image in segment.images)


class PackViewer:
    """Views of the sequences of one plan."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seq_length: int,
        tokens_per_image: int,
        seed: int,
        segment_align: int = 1,
        algorithm: Algorithm = "balanced",
        too_long: TooLong = "drop",
    ):
        """Plan the dataset as training would.

        Raises:
            DataError: no sample fits.
        """
        from ghostvis_mega.data.source import BatchSource  # imports torch, only needed here

        self._dataset = dataset
        self._tokens_per_image = tokens_per_image
        self._source = BatchSource(
            dataset,
            seq_length=seq_length,
            global_size=1,
            micro_size=1,
            data_parallel=1,
            packing=True,
            tokens_per_image=tokens_per_image,
            seed=seed,
            segment_align=segment_align,
            algorithm=algorithm,
            too_long=too_long,
        )
        self._pieces: dict[int, tuple[str, bool]] = {}
        self._specials = set(dataset.manifest.tokenizer.specials.values())

    @property
    def num_packs(self) -> int:
        """Sequences of one epoch."""
        return self._source.plan.num_packs

    def random_packs(self, count: int, *, seed: int) -> list[int]:
        """Numbers of some packs, ascending."""
        return sorted(shuffled(self.num_packs, seed, _SHUFFLE_KEY)[:count].tolist())

    def pack_of_key(self, key: str) -> int:
        """Number of the pack that holds the sample with a source key.

        Raises:
            DataError: no sample has the key, or it was too long for a sequence.
        """
        dataset = self._dataset
        for sample in range(dataset.num_samples):
            if dataset.sample_key(sample)[0] == key:
                break
        else:
            example = dataset.sample_key(0)[0]
            raise DataError(f"no sample of {dataset.path} has the key {key!r}; one is {example!r}")
        plan = self._source.plan
        places = np.flatnonzero(plan.samples == sample)
        if not len(places):
            raise DataError(
                f"sample {key!r} is longer than {self._source.seq_length} positions, so no "
                "sequence holds it: raise --seq-length"
            )
        return int(np.searchsorted(plan.offsets, places[0], side="right")) - 1

    def view(self, number: int) -> PackView:
        """One pack as training gets it.

        Raises:
            DataError: there is no such pack, or a stored sample is damaged.
        """
        plan = self._source.plan
        if not 0 <= number < plan.num_packs:
            raise DataError(f"pack {number} does not exist: the plan has 0 to {plan.num_packs - 1}")
        meta = self._source.sequence(0, number)
        batch = self._source.micro_batch((meta,))
        assert batch.cu_seqlens is not None, "packed rows have segment borders"
        borders = batch.cu_seqlens.tolist()
        tokens, positions = batch.tokens_BS[0].tolist(), batch.positions_BS[0].tolist()
        # A label belongs to the position before the token that it names.
        targets = [False, *(batch.weights_BS[0] > 0).tolist()[:-1]]
        slots = {slot.start: slot.image_id for slot in batch.images}
        segments = []
        for place, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            sample = batch.sample_ids[place] if place < len(batch.sample_ids) else None
            parts = (
                () if sample is None else self._parts(start, end, tokens, positions, targets, slots)
            )
            piece = meta.pieces[place] if sample is not None and meta.pieces else None
            segments.append(self._segment(start, end, positions, sample, piece, tuple(parts)))
        return PackView(
            number=number,
            seq_length=self._source.seq_length,
            cu_seqlens=tuple(borders),
            max_seqlen=batch.max_seqlen,
            weight=float(batch.weights_BS.sum()),
            segments=tuple(segments),
            used=meta.num_tokens,
        )

    def _segment(
        self,
        start: int,
        end: int,
        positions: Sequence[int],
        sample: int | None,
        piece: tuple[int, int] | None,
        parts: tuple[TokenView | ImageView, ...],
    ) -> SegmentView:
        key, answers, source = "", (), ""
        if sample is not None:
            key, answers = self._dataset.sample_key(sample)
            record = self._dataset.sample_index[sample]
            number = int(record["source"])
            piece = None if piece == (0, int(record["tok_len"])) else piece
            source = self._dataset.manifest.sources[number].name
        return SegmentView(
            start=start,
            end=end,
            first_position=positions[start],
            last_position=positions[end - 1],
            sample=sample,
            key=key,
            source=source,
            answers=answers,
            piece=piece,
            parts=parts,
        )

    def _parts(
        self,
        start: int,
        end: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        targets: Sequence[bool],
        slots: dict[int, int],
    ) -> Iterable[TokenView | ImageView]:
        index = start
        while index < end:
            if (image_id := slots.get(index)) is not None:
                yield self._image(index, positions[index], image_id)
                index += self._tokens_per_image
                continue
            text, special = self._piece(tokens[index])
            yield TokenView(index, tokens[index], positions[index], text, special, targets[index])
            index += 1

    def _image(self, index: int, position: int, image_id: int) -> ImageView:
        from ghostvis_mega.data.layout import ImageFormat

        record = self._dataset.image_index[image_id]
        return ImageView(
            index=index,
            length=self._tokens_per_image,
            first_position=position,
            image_id=image_id,
            width=int(record["width"]),
            height=int(record["height"]),
            encoding=ImageFormat(int(record["format"])).name,
        )

    def _piece(self, token: int) -> tuple[str, bool]:
        """Text of a token for people, and whether only the template can write it."""
        if token not in self._pieces:
            piece = self._dataset.tokenizer.piece(token)
            self._pieces[token] = (piece.replace("\u2581", " "), token in self._specials)
        return self._pieces[token]
