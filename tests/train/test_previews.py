"""Which held-out samples are shown, and that text and pictures of a preview belong together."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ghostvis_mega.config.load import load_run_config
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_pixels
from ghostvis_mega.engine.decode import Prompt
from ghostvis_mega.train import previews
from ghostvis_mega.train.previews import Previewer, build_decoder

RUN = """\
model: {{preset: vlm_tiny}}
data: {{train: {data}/train.gvd, heldout: {data}/test.gvd, seq_length: 128}}
batch: {{global_size: 4}}
deepspeed: {{llm: ds_configs/zero1.json}}
train: {{steps: 1}}
log: {{output: {folder}/run}}
"""


@pytest.fixture
def heldout(easy_vqa: Path) -> Dataset:
    return Dataset.open(easy_vqa / "test.gvd")


def make_run(data: Path, folder: Path, *, samples: int) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(RUN.format(data=data, folder=folder))
    return load_run_config(path, [f"log.preview_samples={samples}"])


def make_engine(run: RunConfig, *, data: int = 1, pipeline: int = 1) -> Any:
    """The part of an engine that building a decoder looks at."""
    degrees = SimpleNamespace(data=data, pipeline=pipeline, context=1)
    return SimpleNamespace(run=run, groups=SimpleNamespace(degrees=degrees))


class Echo:
    """Answers with the prompt's length and picture, so that answers cannot change places."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def text(self, prompt: Prompt) -> str:
        return f"  {len(prompt.tokens)} {prompt.image_ids[0]} "

    def answers(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        progress: Callable[[str], None],
    ) -> list[list[int]]:
        progress(f"{len(prompts)} prompts")
        return [self.dataset.tokenizer.encode(self.text(prompt)) for prompt in prompts]


def test_previews_show_the_samples_of_the_dataset(
    easy_vqa: Path, heldout: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(easy_vqa, tmp_path, samples=5)
    echo = Echo(heldout)
    monkeypatch.setattr(previews, "build_decoder", lambda *_, rows: echo)
    previewer = Previewer(make_engine(run), heldout, run)
    told: list[str] = []
    shown = previewer.look(progress=told.append)
    assert told == ["5 prompts"]
    assert len(shown) == 5
    for index, preview in zip(previewer.samples, shown, strict=True):
        tokens, image_ids, truth, question = heldout.prompt(index)
        assert preview.images_png == tuple(heldout.image_bytes(image) for image in image_ids)
        assert (preview.question, preview.truth) == (question, truth)
        assert preview.answer == echo.text(Prompt(tuple(tokens), image_ids)).strip()
    assert len({preview.images_png for preview in shown}) > 1
    assert previewer.look(progress=told.append) == shown


@pytest.mark.parametrize("samples", [1, 5, 12, 100])
def test_samples_are_distinct_and_spread(
    easy_vqa: Path, heldout: Dataset, tmp_path: Path, samples: int
) -> None:
    run = make_run(easy_vqa, tmp_path, samples=samples)
    chosen = Previewer(make_engine(run), heldout, run).samples
    count = min(samples, heldout.num_samples)
    assert len(set(chosen)) == len(chosen) == count
    gaps = {after - before for before, after in zip(chosen, chosen[1:], strict=False)}
    assert all(abs(gap - heldout.num_samples / count) < 1 for gap in gaps)
    assert min(chosen) >= 0 and max(chosen) < heldout.num_samples


def test_the_decoder_reads_the_dataset_as_it_is(
    easy_vqa: Path, heldout: Dataset, tmp_path: Path
) -> None:
    run = make_run(easy_vqa, tmp_path, samples=8)
    decoder = build_decoder(make_engine(run, data=2, pipeline=4), heldout, rows=5)
    specials = heldout.manifest.tokenizer.specials
    assert (decoder.image_token, decoder.stop_token) == (specials["image"], specials["im_end"])
    assert decoder.vocab_size == heldout.manifest.tokenizer.vocab_size
    assert (decoder.rows, decoder.micro_batches) == (8, 4)
    pixels = decoder.load_pixels([2, 0])
    assert torch.equal(pixels, load_pixels(heldout, [2, 0], size=64, seeds=None))
    assert not torch.equal(pixels[0], pixels[1])
