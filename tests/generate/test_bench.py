"""The benchmark's whole way on a CPU, at the small model's size."""

from pathlib import Path

import torch

from ghostvis_mega.generate import bench
from ghostvis_mega.generate.bench import Bench, Plan, bench_generate_rows

PLAN = Plan(preset="tiny", device=torch.device("cpu"), tokens=3, rounds=1, batches=(1, 2))


def test_every_row_is_there_and_tokens_agree(tmp_path: Path):
    rows = {row["name"]: row for row in bench_generate_rows(PLAN, tmp_path)}
    assert rows["greedy tokens that agree with transformers'"]["ok"] is True
    for batch in (1, 2):
        for what in ("text", "one picture each"):
            parts = [rows[f"batch {batch}, {what}: {name}"]["value"] for name in (
                "ours", "transformers", "ours / transformers")]  # fmt: skip
            assert parts[2] == parts[0] / parts[1] > 0
    assert rows["first token: new picture / known picture"]["value"] > 0


def test_other_weights_do_not_agree(tmp_path: Path):
    found = Bench(PLAN, tmp_path)
    layer = found.engine.decoder.layers[0]
    layer.down_weight.mul_(-1)
    found.agreement()
    assert found.rows[0]["ok"] is False and found.rows[0]["value"] < 1


def test_a_step_that_hangs_ends(monkeypatch, tmp_path: Path):
    armed = []
    monkeypatch.setattr(
        bench.faulthandler, "dump_traceback_later", lambda limit, exit: armed.append((limit, exit))
    )
    Bench(PLAN, tmp_path)
    assert armed == [(PLAN.step_limit_s, True)] * 3
