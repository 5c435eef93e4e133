"""Statistics against plain counting, balance against BatchSource, the page against hostility."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.ingest import BadRow, Row, Source, ingest
from ghostvis_mega.data.looks.balance import PACKS_PER_RANK, pack_costs, simulate
from ghostvis_mega.data.looks.mix import ghostvis_mix
from ghostvis_mega.data.looks.packing import STRATEGIES, Samples, pack_dataset, pack_samples
from ghostvis_mega.data.looks.stats_page import dataset_pictures, render_stats
from ghostvis_mega.data.looks.stats_text import stats_text
from ghostvis_mega.data.plan import PlanParams
from ghostvis_mega.data.source import BatchSource
from ghostvis_mega.data.stats import dataset_stats, mix_stats
from ghostvis_mega.data.template import ImagePart, Turn
from ghostvis_mega.data.tokenizer import Tokenizer
from tests.data.conftest import png
from tests.train.test_report import HOSTILE, Page
from tools.preprocess.cli import main

SEQ, WIDTH, SEED = 192, 16, 3
OPTIONS = {"seq_length": SEQ, "tokens_per_image": WIDTH, "seed": SEED, "data_parallel": (2, 8)}


@pytest.fixture(scope="module")
def stats(dataset: Dataset) -> dict:
    return dataset_stats(dataset, **OPTIONS)


def _source(dataset: Dataset, *, data_parallel: int, global_size: int) -> BatchSource:
    return BatchSource(
        dataset,
        seq_length=SEQ,
        global_size=global_size,
        micro_size=1,
        data_parallel=data_parallel,
        packing=True,
        tokens_per_image=WIDTH,
        seed=SEED,
    )


def test_positions_are_those_of_an_epoch(dataset: Dataset, stats: dict) -> None:
    """Counted again from the micro-batches that training gets."""
    source = _source(dataset, data_parallel=1, global_size=1)
    positions, trained, images = 0, 0, 0
    for step in range(source.plan.num_packs):
        (sequence,) = source.global_batch(step).sequences
        batch = source.micro_batch((sequence,))
        positions += sequence.num_tokens
        trained += int(batch.weights_BS.sum())
        images += WIDTH * len(batch.images)
    assert stats["too_long"] == 0
    assert sum(stats["tokens"].values()) == positions
    assert stats["tokens"]["image"] == images
    assert sum(source["trained_tokens"] for source in stats["sources"]) == trained
    assert stats["trained_share"] == pytest.approx(trained / positions, abs=1e-5)


def _roles_of(dataset: Dataset) -> Counter[str]:
    """Tokens of each role and of the template, position by position, without pictures."""
    names = ("system", "user", "assistant", "tool", "image", "eos", "text")
    expected: Counter[str] = Counter()
    for index in range(dataset.num_samples):
        sample = dataset.sample(index)
        role = ["template"] * len(sample.tokens)
        for span in sample.spans:
            for position in range(span["start"], span["start"] + span["len"]):
                role[position] = names[span["role"]]
        for position in sample.image_positions:
            role[position] = "nothing"
        expected.update(role)
    del expected["nothing"]
    return expected


def test_roles_are_counted_position_by_position(dataset: Dataset, stats: dict) -> None:
    expected = _roles_of(dataset)
    assert {name: stats["tokens"][name] for name in expected} == expected


def test_pictures_count_for_no_role_wherever_they_stand(
    build: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    picture = (ImagePart(), "yes no")
    turns = {
        "system": (Turn("system", picture), Turn("user", ("is it ?",)), Turn("assistant", ("no",))),
        "user": (Turn("user", ("yes", *picture)), Turn("assistant", ("no",))),
        "tool": (
            *(Turn("user", ("no ?",)), Turn("assistant", ("is it ?",))),
            *(Turn("tool", picture), Turn("assistant", ("no",))),
        ),
    }
    rows = [
        Row(f"{name}{number}", turns[name], (tmp_path / "a.png",))
        for name, times in (("user", 9), ("system", 3), ("tool", 2))
        for number in range(times)
    ]
    with Dataset.open(build(rows)) as opened:
        found = dataset_stats(opened, **OPTIONS)["tokens"]
        expected = _roles_of(opened)
    assert found == {**expected, "image": len(rows) * WIDTH}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_sample_is_packed_once(dataset: Dataset, strategy: str) -> None:
    lengths = dataset.lengths(tokens_per_image=WIDTH)
    ids, counts = dataset.image_ids(np.arange(dataset.num_samples))
    samples = Samples(lengths, counts, ids)
    plain = pack_samples(samples, strategy=strategy, seq_length=SEQ, seed=SEED)
    params = PlanParams("balanced", SEQ, WIDTH, SEED)
    for packed in (plain, pack_dataset(dataset, samples, strategy=strategy, params=params)):
        assert packed.tokens.sum() == lengths.sum()
        assert packed.segments.sum() == len(lengths)
        assert packed.images.sum() == counts.sum()
        assert (packed.tokens <= packed.slots).all()
        assert (packed.distinct <= packed.images).all()
        assert packed.sumsq.sum() == pytest.approx(float((lengths**2).sum()))


def test_images_of_a_pack_are_counted_once(dataset: Dataset, stats: dict) -> None:
    plan = _source(dataset, data_parallel=1, global_size=1).plan
    distinct = stats["packing"]["balanced"]["distinct_images_per_sequence"]
    assert distinct["mean"] == pytest.approx(plan.distinct_images.mean(), abs=1e-4)
    assert distinct["sd"] == pytest.approx(plan.distinct_images.std(), abs=1e-4)
    assert stats["packing"]["balanced"]["fill"] == pytest.approx(plan.fill, abs=1e-5)
    assert sum(stats["packing"]["balanced"]["fill_histogram"]) == plan.num_packs


@pytest.mark.parametrize("data_parallel", [2, 8])
def test_the_balance_is_that_of_batch_source(dataset: Dataset, data_parallel: int) -> None:
    """The simulated load of the ranks equals what BatchSource deals to them."""
    size, patches = PACKS_PER_RANK * data_parallel, 64
    source = _source(dataset, data_parallel=data_parallel, global_size=size)
    ids, counts = dataset.image_ids(np.arange(dataset.num_samples))
    samples = Samples(dataset.lengths(tokens_per_image=WIDTH), counts, ids)
    packed = pack_dataset(dataset, samples, strategy="balanced", params=source.plan.params)
    found = simulate(packed, data_parallel=data_parallel, patches_per_image=patches, seed=SEED)
    costs = pack_costs(packed, patches_per_image=patches)
    number_of = {
        tuple(source.plan.pack(pack).tolist()): pack for pack in range(source.plan.num_packs)
    }
    ratios = []
    for step in range(found["steps"]):
        loads = np.array(
            [
                sum(costs[number_of[row.sample_ids]] for micro in replica for row in micro)
                for replica in source.global_batch(step).replicas
            ]
        )
        ratios.append(loads.max(axis=0) / loads.mean(axis=0))
    tower, total = np.mean(ratios, axis=0)
    assert found["assigned"] == {"tower": round(tower, 4), "total": round(total, 4)}
    assert found["naive"]["total"] > 1.0


def test_the_mix_is_what_its_description_says() -> None:
    lengths, images = ghostvis_mix(50_000, seq_length=10**9, tokens_per_image=64, seed=1)
    assert images.mean() == pytest.approx(0.8, abs=0.01)
    assert np.median(lengths[images == 1]) == pytest.approx(64 + 35, abs=2)
    assert np.median(lengths[images == 0]) == pytest.approx(500, rel=0.06)
    assert lengths[images == 1].min() >= 64 + 16
    assert len(lengths) == 50_000
    short, _ = ghostvis_mix(50_000, seq_length=4096, tokens_per_image=64, seed=1)
    assert np.array_equal(short, lengths[lengths <= 4096])


def test_rejects_and_repeats_are_counted(
    tokenizer: Tokenizer, rows: list[Row], tmp_path: Path
) -> None:
    bad = [BadRow(str(n), "bad_json" if n % 3 else "bad_row", "x") for n in range(7)]
    text = Row("t", (Turn("user", ("yes",)), Turn("assistant", ("no",))))
    sources = [Source("one", [*rows, *bad]), Source("two", [text, text])]
    ingest(sources, tokenizer=tokenizer, path=tmp_path / "x.gvd")
    with Dataset.open(tmp_path / "x.gvd") as opened:
        stats = dataset_stats(opened, **OPTIONS)
    assert stats["rejects"] == {"bad_json": 4, "bad_row": 3}
    assert [source["samples"] for source in stats["sources"]] == [len(rows), 2]
    assert stats["sources"][1]["image_positions"] == 0
    assert stats["repeated_samples"] >= 1
    assert sum(row["places"] for row in stats["top_images"]) == sum(len(r.images) for r in rows)


def test_the_page_is_whole_and_loads_nothing(dataset: Dataset, stats: dict) -> None:
    text = render_stats(stats, dataset_pictures(dataset, stats))
    page = Page(text)
    assert page.count("img") == len(stats["top_images"]) == 5
    assert page.count("script") == 0
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/"), (tag, name)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    for strategy in STRATEGIES:
        assert f"<th>{strategy}</th>" in text
    assert json.loads(json.dumps(stats)) == stats


def test_hostile_names_are_text(dataset: Dataset, stats: dict) -> None:
    named = {**stats, "path": f"/x/{HOSTILE.replace('/', '')}", "rejects": {HOSTILE: 3}}
    named["sources"] = [{**stats["sources"][0], "name": HOSTILE, "license": HOSTILE}]
    named["image_formats"] = {HOSTILE: 1}
    page = Page(render_stats(named, {}))
    assert page.count("script") == page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_a_dataset_of_text_has_a_page_too(build: Callable[..., Path]) -> None:
    rows = [
        Row(str(n), (Turn("user", ("yes " * (n % 9 + 1),)), Turn("assistant", ("no",))))
        for n in range(40)
    ]
    with Dataset.open(build(rows)) as opened:
        stats = dataset_stats(opened, **OPTIONS)
    assert stats["tokens"]["image"] == 0
    assert all(row["assigned"]["tower"] == 1.0 for row in stats["balance"])
    assert Page(render_stats(stats, {})).count("figure") == 3
    assert "text only" in stats_text(stats)


def test_a_missed_bar_is_said() -> None:
    """Next to no samples cannot fill sequences, so the bar must be missed, and say so."""
    stats = mix_stats(seq_length=4096, tokens_per_image=64, seed=0, count=60, data_parallel=(8,))
    assert not stats["bars"][0]["ok"]
    assert "MISSED  padding waste" in stats_text(stats)
    assert "bars missed" in render_stats(stats, {})


def test_the_mix_meets_its_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """Waste, images a sequence, and tower and total cost over 8 and 32 ranks, as printed."""
    with pytest.raises(SystemExit) as end:
        main(["stats", "--lengths", "ghostvis-mix", "--json"])
    assert end.value.code == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["seq_length"], stats["samples"] + stats["too_long"]) == (4096, 200_000)
    balanced = stats["packing"]["balanced"]
    images = balanced["images_per_sequence"]
    assert balanced["padding_waste"] <= 0.002
    assert balanced["bound_waste"] <= balanced["padding_waste"]
    assert images["sd"] <= 0.35 * images["mean"]
    assert [row["data_parallel"] for row in stats["balance"]] == [8, 32, 512]
    for row in stats["balance"][:2]:
        assert row["assigned"]["tower"] <= 1.10
        assert row["assigned"]["total"] <= 1.05
        assert row["naive"]["tower"] > row["assigned"]["tower"] + 0.05
    assert len(stats["bars"]) == 6
    assert all(bar["ok"] for bar in stats["bars"])


@pytest.mark.parametrize("seed", [1, 2])
def test_the_mix_is_packed_alike_with_other_seeds(seed: int) -> None:
    stats = mix_stats(seq_length=4096, tokens_per_image=64, seed=seed, data_parallel=(8, 32))
    assert all(bar["ok"] for bar in stats["bars"])
    assert stats["packing"]["balanced"]["padding_waste"] <= 0.002


def test_the_bars_need_what_packing_and_dealing_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing held back packs end up less full, and with plain dealing they load unevenly."""
    monkeypatch.setattr(
        "ghostvis_mega.data.packing.hold_back", lambda sizes, *_, **__: np.zeros(len(sizes), bool)
    )
    monkeypatch.setattr("ghostvis_mega.data.source._TOO_UNEVEN", math.inf)
    stats = mix_stats(seq_length=4096, tokens_per_image=64, seed=0, data_parallel=(32,))
    assert stats["packing"]["balanced"]["padding_waste"] > 0.006
    assert {bar["name"] for bar in stats["bars"] if not bar["ok"]} >= {
        "tower cost, max / mean over 32 ranks"
    }


def test_the_demo_meets_its_bars(tmp_path: Path) -> None:
    """The demo's own pictures and questions, sequence length and tokens an image."""
    pytest.importorskip("easy_vqa")
    from ghostvis_mega.data.readers.easy_vqa import easy_vqa_source, easy_vqa_text
    from ghostvis_mega.data.template import ROLES
    from ghostvis_mega.data.tokenizer import train_tokenizer

    lines = [*easy_vqa_text("train"), *ROLES]
    tokenizer = train_tokenizer(lines, vocab_size=512, path=tmp_path / "tok.model")
    ingest([easy_vqa_source("test")], tokenizer=tokenizer, path=tmp_path / "demo.gvd")
    with Dataset.open(tmp_path / "demo.gvd") as opened:
        stats = dataset_stats(
            opened, seq_length=1024, tokens_per_image=16, seed=0, patches_per_image=64,
            data_parallel=(8, 32),
        )  # fmt: skip
    assert stats["bars"][0]["limit"] == 0.015
    assert [bar["name"] for bar in stats["bars"] if not bar["ok"]] == []


@pytest.mark.parametrize("command", ["stats", "inspect"])
def test_a_page_may_be_in_a_new_folder(
    command: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What cannot be written is said before the work, in one sentence."""
    sizes = ["--seq-length", str(SEQ), "--tokens-per-image", str(WIDTH)]
    page = tmp_path / "new" / "folder" / "page.html"
    with pytest.raises(SystemExit, match="0"):
        main([command, str(dataset.path), *sizes, "--html", str(page)])
    assert page.is_file()
    capsys.readouterr()
    monkeypatch.setattr(Dataset, "open", lambda path: pytest.fail("work before the check"))
    for wrong in (page / "below.html", tmp_path / "new"):
        assert main([command, str(dataset.path), *sizes, "--html", str(wrong)]) == 2
        problem = capsys.readouterr().err
        assert str(wrong) in problem and problem.count("\n") == 1
