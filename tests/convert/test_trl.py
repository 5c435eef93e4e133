"""TRL trains on an export; runs where TRL is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.exporter import ExportOptions, export_hf
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from tests.convert.cases import TIED, llava_config, randomise, save
from tests.launch import ROOT

pytest.importorskip("trl", reason="TRL lives in another environment: pip install trl")


def test_one_step_of_grpo_moves_the_exported_model(tmp_path: Path, easy_vqa: Path):
    text = TIED | {"vocab_size": 512, "max_position_embeddings": 256}
    model = randomise(LlavaForConditionalGeneration(llava_config("siglip", text)))
    native = import_hf([save(model, tmp_path / "hf")], tmp_path / "native", ImportOptions())
    data = easy_vqa / "train.gvd"
    out = export_hf(native, tmp_path / "out", ExportOptions(assets=Assets(data=data)))
    text = subprocess.run(
        [sys.executable, "examples/trl_grpo.py", str(out), str(data), "--cpu"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    ).stdout
    moved, _, whole = text.splitlines()[-1].split()[:3]
    # All but the last norm of the tower, which LLaVA does not use.
    assert int(moved) == int(whole) - 2
