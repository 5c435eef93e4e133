"""The pack viewer shows what BatchSource.micro_batch makes, and nothing a sample says is markup."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import Row
from ghostvis_mega.data.looks.pack_page import page_pictures, render_packs
from ghostvis_mega.data.looks.pack_text import pack_text
from ghostvis_mega.data.looks.pack_view import ImageView, PackView, PackViewer, TokenView
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.data.template import Turn
from ghostvis_mega.utils.errors import DataError
from tests.train.test_report import HOSTILE, Page
from tools.preprocess.cli import main

SEQ, WIDTH, SEED = 192, 16, 3


@pytest.fixture(scope="module")
def viewer(dataset: Dataset) -> PackViewer:
    return PackViewer(dataset, seq_length=SEQ, tokens_per_image=WIDTH, seed=SEED)


def _flat(pack: PackView, *, image_token: int, pad: int) -> tuple[list[int], list[int], set[int]]:
    """Token ids and position ids of all positions, and the trained ones, as the view tells them."""
    tokens, positions, targets = [pad] * SEQ, [0] * SEQ, set()
    for segment in pack.segments:
        if segment.sample is None:
            positions[segment.start : segment.end] = range(segment.end - segment.start)
        for part in segment.parts:
            if isinstance(part, ImageView):
                for offset in range(part.length):
                    tokens[part.index + offset] = image_token
                    positions[part.index + offset] = part.first_position + offset
                continue
            tokens[part.index], positions[part.index] = part.token, part.position
            if part.target:
                targets.add(part.index)
    return tokens, positions, targets


def test_every_position_is_that_of_the_micro_batch(dataset: Dataset, viewer: PackViewer) -> None:
    source = BatchSource(
        dataset, seq_length=SEQ, global_size=1, micro_size=1, data_parallel=1, packing=True,
        tokens_per_image=WIDTH, seed=SEED,
    )  # fmt: skip
    number_of = {
        tuple(source.plan.pack(pack).tolist()): pack for pack in range(source.plan.num_packs)
    }
    assert viewer.num_packs == len(number_of) > 5
    specials = dataset.manifest.tokenizer.specials
    for step in range(source.plan.num_packs):
        (sequence,) = source.global_batch(step).sequences
        batch = source.micro_batch((sequence,))
        pack = viewer.view(number_of[sequence.sample_ids])
        tokens, positions, targets = _flat(pack, image_token=specials["image"], pad=specials["pad"])
        assert tokens == batch.tokens_BS[0].tolist()
        assert positions == batch.positions_BS[0].tolist()
        weighted = {place + 1 for place in batch.weights_BS[0].nonzero().flatten().tolist()}
        assert targets == weighted
        assert list(pack.cu_seqlens) == batch.cu_seqlens.tolist()
        assert tuple(s.sample for s in pack.segments if s.sample is not None) == batch.sample_ids
        assert [(i.image_id, i.index) for i in pack.images] == [
            (slot.image_id, slot.start) for slot in batch.images
        ]
        for segment in pack.segments:
            if segment.sample is not None:
                assert segment.key == f"row/{segment.sample}"
                said = "".join(token.text for token in segment.targets)
                assert said.startswith(segment.answers[0])


def test_a_key_leads_to_its_pack(dataset: Dataset, viewer: PackViewer) -> None:
    for key in ("row/0", "row/33", "row/59"):
        pack = viewer.view(viewer.pack_of_key(key))
        assert key in [segment.key for segment in pack.segments]
    with pytest.raises(DataError, match=r"no sample of .* has the key 'row/60'; one is 'row/0'"):
        viewer.pack_of_key("row/60")
    with pytest.raises(DataError, match="does not exist: the plan has 0 to"):
        viewer.view(viewer.num_packs)


def test_a_sample_that_is_too_long_is_named(dataset: Dataset) -> None:
    lengths = dataset.lengths(tokens_per_image=WIDTH)
    longest = int(lengths.argmax())
    small = PackViewer(dataset, seq_length=int(lengths.max()) - 1, tokens_per_image=WIDTH, seed=0)
    with pytest.raises(DataError, match="longer than"):
        small.pack_of_key(f"row/{longest}")


def test_random_packs_depend_on_the_seed_alone(viewer: PackViewer) -> None:
    first = viewer.random_packs(4, seed=1)
    assert first == viewer.random_packs(4, seed=1) == sorted(set(first))
    assert len({tuple(viewer.random_packs(4, seed=seed)) for seed in range(6)}) > 1


def test_the_page_holds_pictures_borders_and_links(dataset: Dataset, viewer: PackViewer) -> None:
    packs = [viewer.view(number) for number in (0, 3)]
    text = render_packs("mixed.gvd", packs, page_pictures(dataset, packs))
    page = Page(text)
    assert page.count("img") == sum(len(pack.images) for pack in packs)
    assert page.count("article") == sum(len(pack.segments) for pack in packs)
    assert page.count("script") == 0
    shown = sum(
        isinstance(part, TokenView) and part.target
        for pack in packs
        for segment in pack.segments
        for part in segment.parts
    )
    assert page.count("i", "target") == shown + 1 == sum(pack.weight for pack in packs) + 1
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for tag, attributes in page.elements:
        if tag == "a":
            assert attributes["href"].removeprefix("#") in anchors
        elif source := attributes.get("src"):
            assert source.startswith("data:image/")
    assert " ".join(str(border) for border in packs[1].cu_seqlens) in text
    assert "http:" not in text and "https:" not in text and "url(" not in text


def test_hostile_samples_are_text(build: Callable[..., Path]) -> None:
    turns = (Turn("user", (HOSTILE + "\x1b[2J",)), Turn("assistant", (HOSTILE,)))
    path = build([Row(f"{HOSTILE}\x1b]0;x\x07", turns, (), (HOSTILE,))])
    with Dataset.open(path) as opened:
        viewer = PackViewer(opened, seq_length=4096, tokens_per_image=1, seed=0)
        packs = [viewer.view(0)]
        page = Page(render_packs(HOSTILE, packs, {}))
    assert page.count("script") == page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "\x1b" not in pack_text(packs[0], colour=False)
    assert "\x1b" in pack_text(packs[0], colour=True)


def test_the_command_prints_and_writes(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--seq-length", str(SEQ), "--tokens-per-image", str(WIDTH)]
    arguments = ["inspect", str(dataset.path), *sizes]

    def run(*more: str) -> int:
        try:
            return main([*arguments, *more])
        except SystemExit as end:
            return int(end.code or 0)

    assert run("--key", "row/8") == 0
    text = capsys.readouterr().out
    assert "cu_seqlens 0 " in text
    assert "row/8" in text and "[the shape is blue.<|im_end|>]" in text
    assert run("--random", "2", "--html", str(tmp_path / "p.html")) == 0
    assert Page((tmp_path / "p.html").read_text()).count("section") == 2
    assert run("--random", "2", "--pack", "1") == 2
    assert "only one of" in capsys.readouterr().err
