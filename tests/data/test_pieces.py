"""Plans that cut samples: every token once, no image cut, labels and positions inside a piece."""

import dataclasses
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ghostvis_mega.data import state
from ghostvis_mega.data.batch import MicroBatch, SequenceMeta
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row, Source, ingest
from ghostvis_mega.data.layout import Role
from ghostvis_mega.data.plan import PackPlan, PlanParams, build_plan, load_or_build, save_plan
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.data.template import DOCUMENT, ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.verify import verify_dataset
from ghostvis_mega.utils.errors import CheckpointError, DataError

WIDTH, LENGTH = 8, 64
CONCAT = PlanParams("concat", LENGTH, WIDTH, 3)


def _chat(number: int, picture: Path) -> Row:
    """Many turns, pictures in two of them; longer than a sequence."""
    turns = []
    for turn in range(4 + number % 3):
        parts = (ImagePart(), "what color?") if turn in (0, 2) else ("is it?" * (turn + 1),)
        turns += [Turn("user", parts), Turn("assistant", (f"answer {number} {turn}.",))]
    return Row(f"long/{number}", tuple(turns), (picture, picture))


@pytest.fixture(scope="module", params=["chatml", "chatml-turns"])
def mixed(
    rows: list[Row],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Dataset:
    """Short conversations, long ones with pictures, short and long documents; trained are answers
    or all turns."""
    picture = next(image for row in rows for image in row.images)
    texts = [
        Row(f"text/{n}", (Turn(DOCUMENT, (f"the shape is blue, number {n}. " * (1 + 3 * n),)),))
        for n in range(12)
    ]
    path = tmp_path_factory.mktemp("pieces") / "mixed.gvd"
    sources = [Source("chat", rows[:30]), Source("long", [_chat(n, picture) for n in range(8)])]
    sources.append(Source("texts", texts))
    ingest(sources, tokenizer=tokenizer, template=request.param, path=path)
    return Dataset.open(path)


def _source(dataset: Dataset, **changes: object) -> BatchSource:
    settings = {
        "seq_length": LENGTH, "global_size": 6, "micro_size": 1, "data_parallel": 1,
        "packing": True, "tokens_per_image": WIDTH, "seed": 3,
    }  # fmt: skip
    return BatchSource(dataset, **{**settings, **changes})


def _row(dataset: Dataset, meta: SequenceMeta, align: int) -> dict[str, list]:
    """The row as the documentation describes it, position by position."""
    specials = dataset.tokenizer.specials
    found: dict[str, list] = {"tokens": [], "labels": [], "weights": [], "positions": []}
    found |= {"cuts": [0], "slots": []}
    images = iter(meta.image_ids)

    def put(token: int, label: int, position: int) -> None:
        found["tokens"].append(token)
        found["labels"].append(max(label, 0))
        found["weights"].append(float(label >= 0))
        found["positions"].append(position)

    for index, (first, count) in zip(meta.sample_ids, meta.pieces, strict=True):
        sample = dataset.sample(index)
        trained = np.zeros(len(sample.tokens) + 1, dtype=bool)
        for start, length, _, train, _ in sample.spans.tolist():
            trained[start : start + length] = bool(train)
        trained[list(sample.image_positions)] = False
        position = 0
        for place in range(first, first + count):
            token = int(sample.tokens[place])
            inside = place + 1 < first + count and trained[place + 1]
            label = int(sample.tokens[place + 1]) if inside else -1
            copies = WIDTH if token == specials["image"] else 1
            if copies > 1:
                found["slots"].append((next(images), len(found["tokens"])))
            for copy in range(copies):
                put(token, label if copy == copies - 1 else -1, position)
                position += 1
        while position % align:
            put(specials["pad"], -1, position)
            position += 1
        found["cuts"].append(len(found["tokens"]))
    for position in range(LENGTH - len(found["tokens"])):
        put(specials["pad"], -1, position)
    if found["cuts"][-1] != LENGTH:
        found["cuts"].append(LENGTH)
    return found


def _of(batch: MicroBatch) -> dict[str, list]:
    assert batch.cu_seqlens is not None
    return {
        "tokens": batch.tokens_BS[0].tolist(),
        "labels": batch.labels_BS[0].tolist(),
        "weights": batch.weights_BS[0].tolist(),
        "positions": batch.positions_BS[0].tolist(),
        "cuts": batch.cu_seqlens.tolist(),
        "slots": [(slot.image_id, slot.start) for slot in batch.images],
    }


POLICIES = [
    ("concat", "drop", 1),
    ("concat", "drop", 8),
    ("balanced", "truncate-at-turn", 1),
    ("balanced", "split-text", 4),
    ("bfd", "split-text", 1),
]


@pytest.mark.parametrize(("algorithm", "too_long", "align"), POLICIES)
def test_micro_batches_of_pieces(mixed: Dataset, algorithm: str, too_long: str, align: int) -> None:
    source = _source(mixed, algorithm=algorithm, too_long=too_long, segment_align=align)
    cut = 0
    for number in range(source.plan.num_packs):
        meta = source.sequence(0, number)
        batch = source.micro_batch((meta,))
        expected = _row(mixed, meta, align)
        assert _of(batch) == expected
        assert meta.trained_tokens == batch.weights_BS.sum()
        ends = [start + WIDTH for _, start in expected["slots"]]
        cuts = set(expected["cuts"])
        assert all(len(cuts & set(range(end - WIDTH + 1, end))) == 0 for end in ends)
        cut += sum(
            piece != (0, len(mixed.sample(i).tokens))
            for i, piece in zip(meta.sample_ids, meta.pieces, strict=True)
        )
        # Negative control: a piece that begins one token later is another row.
        (first, count), *rest = meta.pieces
        if count > 1:
            moved = replace(meta, pieces=((first + 1, count - 1), *rest))
            tokens = mixed.sample(meta.sample_ids[0]).tokens
            if tokens[first] != mixed.tokenizer.specials["image"]:
                assert _of(source.micro_batch((moved,))) != expected
    assert cut > 3


def _ranges(plan: PackPlan) -> dict[int, list[tuple[int, int]]]:
    """Pieces of each sample by their first token."""
    found = defaultdict(list)
    assert plan.pieces is not None
    for sample, (start, count) in zip(plan.samples.tolist(), plan.pieces.tolist(), strict=True):
        found[sample].append((start, count))
    return {sample: sorted(pieces) for sample, pieces in found.items()}


@pytest.mark.parametrize("align", [1, 4])
def test_concat_holds_every_token_once_and_no_padding(mixed: Dataset, align: int) -> None:
    plan = build_plan(mixed, replace(CONCAT, segment_align=align))
    ranges = _ranges(plan)
    assert sorted(ranges) == list(range(mixed.num_samples)) and not len(plan.dropped)
    for sample, pieces in ranges.items():
        ends = [start + count for start, count in pieces]
        assert [start for start, _ in pieces] == [0, *ends[:-1]]
        assert ends[-1] == len(mixed.sample(sample).tokens)
    assert plan.tokens.sum() == mixed.lengths(tokens_per_image=WIDTH).sum()
    assert plan.images.sum() == mixed.sample_index["n_images"].sum()
    # All but the last sequence are full, except where the next thing was a picture.
    room = LENGTH - plan.tokens.astype(np.int64)
    assert np.count_nonzero(room >= WIDTH + align * plan.segments) <= 1
    if align == 1:
        dense = build_plan(mixed, replace(CONCAT, tokens_per_image=1))
        assert np.count_nonzero(dense.tokens < LENGTH) <= 1
    assert replace(CONCAT, seed=4).digest(mixed) != CONCAT.digest(mixed)
    again = build_plan(mixed, replace(CONCAT, segment_align=align))
    assert again.samples.tobytes() == plan.samples.tobytes()


def test_a_picture_wider_than_a_sequence_cannot_be_concatenated(mixed: Dataset) -> None:
    with pytest.raises(DataError, match="takes 65 positions and cannot be cut"):
        build_plan(mixed, replace(CONCAT, tokens_per_image=65))


def test_truncation_keeps_whole_answers(mixed: Dataset) -> None:
    plan = build_plan(mixed, replace(CONCAT, algorithm="balanced", too_long="truncate-at-turn"))
    plain = build_plan(mixed, replace(CONCAT, algorithm="balanced"))
    assert plain.pieces is None
    lengths = mixed.lengths(tokens_per_image=WIDTH)
    long = {n for n in range(mixed.num_samples) if mixed.sample(n).key.startswith("long")}
    assert long <= set(plain.dropped.tolist()) and not long & set(plan.dropped.tolist())
    # Documents have no turns: they are left out as before.
    saved = set(plain.dropped.tolist()) - set(plan.dropped.tolist())
    assert long <= saved and not any(mixed.sample(n).key.startswith("text") for n in saved)
    ranges = _ranges(plan)
    for index in long:
        sample, ((start, count),) = mixed.sample(index), ranges[index]
        roles = [(s["start"] + s["len"], s["role"]) for s in sample.spans if s["role"] == Role.EOS]
        turns = [end for (end, _), turn in zip(roles, range(len(roles)), strict=True) if turn % 2]
        assert start == 0 and count in turns
        later = [end for end in turns if end > count]
        images = sum(place < later[0] for place in sample.image_positions)
        assert later[0] + images * (WIDTH - 1) > LENGTH  # the next answer would not have fitted
        assert lengths[index] > LENGTH


def test_documents_are_split_and_keep_every_token(mixed: Dataset) -> None:
    plan = build_plan(mixed, replace(CONCAT, algorithm="bfd", too_long="split-text"))
    split = {sample: pieces for sample, pieces in _ranges(plan).items() if len(pieces) > 1}
    assert len(split) > 3
    for sample, pieces in split.items():
        assert mixed.sample(sample).key.startswith("text")
        counts = [count for _, count in pieces]
        assert sum(counts) == len(mixed.sample(sample).tokens) and min(counts) > 1
        assert max(counts) <= LENGTH
    dropped = {mixed.sample(n).key.split("/")[0] for n in plan.dropped.tolist()}
    assert dropped == {"long", "row"}  # conversations are never split


def test_rows_without_packing_hold_truncated_samples(mixed: Dataset) -> None:
    source = _source(mixed, packing=False, too_long="truncate-at-turn", segment_align=8)
    plain = _source(mixed, packing=False)
    assert len(plain.plan.dropped) > len(source.plan.dropped)
    for number in range(source.plan.num_packs):
        meta = source.sequence(0, number)
        batch = source.micro_batch((meta,))
        assert batch.cu_seqlens is None
        expected = _row(mixed, meta, 1)
        assert batch.tokens_BS[0].tolist() == expected["tokens"]
        assert batch.labels_BS[0].tolist() == expected["labels"]
        assert batch.weights_BS.sum() == meta.trained_tokens > 0


def test_plans_with_pieces_are_stored_verified_and_refused_when_damaged(
    mixed: Dataset,
) -> None:
    plan = build_plan(mixed, CONCAT)
    directory = save_plan(mixed, plan)
    loaded = load_or_build(mixed, CONCAT)
    for field in dataclasses.fields(PackPlan):
        assert np.array_equal(getattr(loaded, field.name), getattr(plan, field.name))
    assert json.loads((directory / "plan.json").read_bytes())["format"] == 2
    assert verify_dataset(mixed.path, deep=True) == []
    file = directory / "pieces.u32"
    whole = file.read_bytes()
    file.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    assert [problem for problem in verify_dataset(mixed.path, deep=False) if "pieces" in problem]
    with pytest.raises(DataError, match="pieces.u32 is missing or damaged"):
        load_or_build(mixed, CONCAT)
    file.unlink()
    assert verify_dataset(mixed.path, deep=False)
    file.write_bytes(whole)
    assert verify_dataset(mixed.path, deep=False) == []


def test_steps_and_resume_know_pieces(mixed: Dataset) -> None:
    sources = {n: _source(mixed, algorithm="concat", data_parallel=n) for n in (1, 2, 3)}
    for step in range(4):
        sets = [
            sorted((row.sample_ids, row.pieces) for row in source.global_batch(step).sequences)
            for source in sources.values()
        ]
        assert sets[0] == sets[1] == sets[2]
    kept = state.describe(sources[1])
    state.check(kept, sources[3], step=1)
    for other in ({}, {"algorithm": "concat", "segment_align": 4}, {"too_long": "split-text"}):
        with pytest.raises(CheckpointError, match=r"plan of|alignment"):
            state.check(kept, _source(mixed, **other), step=1)


def test_a_damaged_sample_keeps_the_shape_of_its_pieces(
    mixed: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    source = _source(mixed, algorithm="concat", on_damage=found.append)
    real = Dataset._check_crc

    def broken(self: Dataset, indices: np.ndarray, records: np.ndarray) -> None:
        if (indices == damaged).any():
            raise DataError(f"sample {damaged} does not match its crc")
        real(self, indices, records)

    seen = 0
    for number in range(source.plan.num_packs):
        meta = source.sequence(0, number)
        damaged = meta.sample_ids[-1]
        good = source.micro_batch((meta,))
        with monkeypatch.context() as patch:
            patch.setattr(Dataset, "_check_crc", broken)
            bad = source.micro_batch((meta,))
        assert torch.equal(good.cu_seqlens, bad.cu_seqlens)
        assert [slot.image_id for slot in good.images] == [slot.image_id for slot in bad.images]
        lost = source.corpus.trained_tokens(damaged, meta.pieces[-1])
        assert good.weights_BS.sum() - bad.weights_BS.sum() == lost
        seen += lost
    assert seen > 0 and {each.sample for each in found} <= set(range(mixed.num_samples))
