"""Rows and ratios are read, and wrong ones are refused with what to do."""

import importlib.util

import pytest

from ghostvis_mega.config import deepspeed
from ghostvis_mega.config.load import read_run_config
from ghostvis_mega.config.rules import find_problems
from ghostvis_mega.perf.train_bench.plans import PictureNeed, TextNeed
from ghostvis_mega.perf.train_bench.presets import PRESETS, preset_plan
from ghostvis_mega.perf.train_bench.rows import (
    OURS,
    Ratio,
    Row,
    choose_rows,
    parse_ratio,
    parse_row,
    peer_problems,
)
from ghostvis_mega.utils.errors import ConfigError


def test_a_row_is_a_name_and_settings() -> None:
    assert parse_row("ours:") == Row("ours", OURS, ())
    text = "HF ZeRO-3: peer=hf data.packing=false deepspeed.llm=ds_configs/zero3.json"
    assert parse_row(text) == Row(
        "HF ZeRO-3", "hf", ("data.packing=false", "deepspeed.llm=ds_configs/zero3.json")
    )


def test_a_row_may_have_variables() -> None:
    row = parse_row("a: env.NVTE_FLASH_ATTN=0 train.fp8=delayed env.EMPTY=")
    assert row.environment == (("NVTE_FLASH_ATTN", "0"), ("EMPTY", ""))
    assert row.settings == ("train.fp8=delayed",)
    assert parse_row("a: may-not-fit train.fp8=delayed") == Row(
        "a", settings=("train.fp8=delayed",), may_not_fit=True
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("x: env.NVTE_FLASH_ATTN", "env.NVTE_FLASH_ATTN has no value"),
        ("train.steps=3", "has no name"),
        (": peer=hf", "has no name"),
        ("a | b: peer=hf", "joins names"),
        ("x: peer=fsdp", "peer=fsdp is unknown. Use ours, megatron"),
        ("x: peer=hf peer=naive", "names 2 peers"),
    ],
)
def test_a_wrong_row_is_refused(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_row(text)


def test_a_ratio_may_have_a_bar() -> None:
    assert parse_ratio("ours BF16 / Megatron-Core >= 1.1") == Ratio(
        "ours BF16", "Megatron-Core", 1.1
    )
    several = parse_ratio("a | b c / d | e >= 1.1")
    assert (several.rows, several.overs) == (["a", "b c"], ["d", "e"])
    assert parse_ratio("a / b") == Ratio("a", "b", None)
    for wrong in ("a over b", "a / b >= 1.1.1", "a/"):
        with pytest.raises(ConfigError, match="is not"):
            parse_ratio(wrong)


def test_names_must_be_there_and_single() -> None:
    rows = [Row("a"), Row("b"), Row("a")]
    with pytest.raises(ConfigError) as caught:
        choose_rows(rows, [Ratio("a", "c")], ["d"])
    told = str(caught.value)
    assert "two rows are called 'a'" in told
    assert "--only 'd' is no row. Use a, b." in told
    assert "the ratio a / c names 'c'" in told
    assert choose_rows(rows[:2], [Ratio("a", "b")], ["b"]) == [Row("b")]
    with pytest.raises(ConfigError, match="nothing to time"):
        choose_rows([], [], [])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_row_of_a_preset_keeps_all_rules(
    name: str, processes: int, tmp_path, monkeypatch
) -> None:
    """On the GPUs that presets are for there is no time to find a wrong row."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    try:
        plan = preset_plan(name, processes=processes, seq_length=0, data=tmp_path)
    except ConfigError as error:
        assert "processes" in str(error)
        assert processes == 1 or name == "tiny"
        return
    assert len(choose_rows(plan.rows, plan.ratios, ())) == len(plan.rows)
    file = plan.write(tmp_path)
    for row in plan.rows:
        fixed = ["train.steps=11", f"log.output={tmp_path}"]
        loaded = read_run_config(file, [*row.settings, *fixed])
        assert loaded.problems == [], row.name
        device = "cpu" if name == "tiny" else "cuda"
        problems = find_problems(loaded.config, world_size=processes, device=device)
        problems += deepspeed.find_problems(loaded.config, world_size=processes)
        assert [*problems, *peer_problems(row, loaded.config)] == [], row.name
        assert len(plan.needs([row])) == 1, "each row names the data that it reads"


def test_the_transformers_peer_is_never_a_weaker_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    plan = preset_plan("text-1.5b", processes=1, seq_length=0, data=tmp_path)
    rows = [row for row in plan.rows if row.kind.startswith("hf")]
    file = plan.write(tmp_path)
    for row in rows:
        run = read_run_config(file, [*row.settings, f"log.output={tmp_path}"]).config
        (problem,) = peer_problems(row, run)
        assert "pip install liger-kernel" in problem
    assert len(rows) == 2


@pytest.mark.parametrize("name", ["text-7b", "text-1.5b", "vlm-1.5b", "ablation-1.5b"])
def test_no_pack_of_text_is_half_empty(name: str, tmp_path) -> None:
    """Steps would differ in their tokens, and not in their time."""
    plan = preset_plan(name, processes=2, seq_length=0, data=tmp_path)
    needs = [need for need in plan.data if isinstance(need, TextNeed)]
    assert needs
    file = plan.write(tmp_path)
    for row in plan.rows:
        run = read_run_config(file, [*row.settings, f"log.output={tmp_path}"]).config
        for need in needs:
            if str(need.path) == str(run.data.train):
                assert run.data.seq_length % need.sample_length == 0
                assert need.samples * need.sample_length % run.data.seq_length == 0
    assert 8_000_000 // 4096 % 2, "as many samples as once, and every table had such a step"


def test_equal_work_in_text_rows(tmp_path) -> None:
    """Ours and peers take the same tokens a step, in micro-batches of the same size."""
    plan = preset_plan("text-7b", processes=4, seq_length=0, data=tmp_path)
    file = plan.write(tmp_path)
    tokens = {}
    for row in plan.rows:
        run = read_run_config(file, [*row.settings, f"log.output={tmp_path}"]).config
        tokens[row.name] = run.data.seq_length * run.batch.global_size
    assert set(tokens.values()) == {64 * 4096}


def test_promises_are_over_the_best_of_all_peers(tmp_path) -> None:
    plan = preset_plan("text-7b", processes=4, seq_length=0, data=tmp_path)
    peers = {row.name for row in plan.rows if row.kind != OURS}
    bf16, fp8, *_ = plan.ratios
    assert bf16.least == 1.10
    assert set(bf16.overs) == peers - {"Megatron-Core FP8"}
    whole = {"TP 1", "TP 1 mbs / 2"}
    assert {f"Megatron-Core {name}" for name in whole} < peers
    assert set(bf16.rows) == set(fp8.overs)
    assert set(bf16.rows) == {"ours", "ours 16k", "ours unfused"} | {f"ours {n}" for n in whole}
    assert set(fp8.rows) == {"ours FP8", "ours FP8 16k"} | {f"ours FP8 {n}" for n in whole}
    assert fp8.least == 1.35
    kinds = [row.kind for row in plan.rows]
    assert kinds == sorted(kinds, key=lambda kind: (kind[:2] == "hf", kind != OURS))
    small = preset_plan("text-1.5b", processes=1, seq_length=0, data=tmp_path)
    assert small.ratios[1].least == 1.0
    assert not any("TP 1" in row.name for row in small.rows)


def test_longer_sequences_are_a_preset_of_their_own(tmp_path) -> None:
    plan = preset_plan("text-1.5b", processes=1, seq_length=8192, data=tmp_path)
    (need,) = plan.data
    assert isinstance(need, TextNeed) and need.sample_length == 8192
    with pytest.raises(ConfigError, match="does not divide"):
        preset_plan("text-1.5b", processes=1, seq_length=5000, data=tmp_path)
    with pytest.raises(ConfigError, match="is for 2 or 4 processes, not 3"):
        preset_plan("text-7b", processes=3, seq_length=0, data=tmp_path)
    with pytest.raises(ConfigError, match="Use a multiple of that"):
        preset_plan("vlm-1.5b", processes=1, seq_length=2048, data=tmp_path)
    with pytest.raises(ConfigError, match="unknown"):
        preset_plan("text-70b", processes=4, seq_length=0, data=tmp_path)


def test_data_are_those_of_the_rows_that_run(tmp_path) -> None:
    plan = preset_plan("tiny", processes=1, seq_length=0, data=tmp_path)
    by_name = {row.name: row for row in plan.rows}
    assert [type(n) for n in plan.needs([by_name["ours"]])] == [TextNeed]
    assert [type(n) for n in plan.needs([by_name["naive VLM"]])] == [PictureNeed]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ("x: peer=hf", "data.packing=true. Set data.packing=false"),
        ("x: peer=naive data.packing=false train.recompute=full", "no activation checkpointing"),
        ("x: peer=hf data.packing=false train.recompute=auto", "Set none or full"),
        ("x: peer=hf data.packing=false parallel.tensor=2", "parallel.tensor=2. Set it to 1"),
        ("x: peer=megatron data.packing=false", "is a text model"),
        ("x: peer=hf data.packing=false model.llm.activation=relu2", "Qwen2.5's layers only"),
    ],
)
def test_what_a_peer_cannot_do_is_said(row: str, word: str) -> None:
    parsed = parse_row(row)
    run = read_run_config("examples/configs/vlm_tiny_easyvqa.yaml", parsed.settings).config
    assert any(word in problem for problem in peer_problems(parsed, run))
