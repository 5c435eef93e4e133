"""Links that lead nowhere, in a circle or up again: a row without a picture, never a crash."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from ghostvis_mega.data.build import build
from ghostvis_mega.data.inputs import content_of, input_files, state_of
from ghostvis_mega.data.recipe import load_recipe
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures and links of every wrong kind, and a table that names them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8)).save(photos / "good.png")
    (photos / "also.png").symlink_to("good.png")
    (photos / "gone.png").symlink_to("nothing.png")
    (photos / "a.png").symlink_to("b.png")
    (photos / "b.png").symlink_to("a.png")
    (photos / "up").symlink_to(photos)
    (photos / "round").symlink_to("round")
    names = ["good.png", "also.png", "gone.png", "a.png", "round/x.png", "up/good.png"]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n},x\n" for n in names))
    return tmp_path


def test_the_rows_are_refused_and_the_rest_is_built(folder: Path, tokenizer: Tokenizer) -> None:
    source = {"format": "csv", "path": "t.csv", "images": "photos", "license": "CC0"}
    recipe = {"out": "a.gvd", "tokenizer": {"file": str(tokenizer.path)}, "sources": [source]}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(folder / "r.yaml")
    assert build(loaded).manifest.counts.samples == 3
    ledger = (folder / "a.gvd" / "rejects.jsonl").read_text()
    assert ledger.count('"missing_image"') == ledger.count("\n") == 3
    assert build(loaded, check=True).up_to_date
    (folder / "photos" / "nothing.png").write_bytes((folder / "photos" / "good.png").read_bytes())
    assert build(loaded).manifest.counts.samples == 4


def test_folders_behind_links_are_no_input(folder: Path) -> None:
    found = {path.name for path in input_files([folder / "photos"], skip=())}
    assert found == {"good.png", "also.png", "gone.png", "a.png", "b.png", "round"}


def test_a_link_to_nothing_counts_and_a_missing_file_is_named(folder: Path) -> None:
    link = folder / "photos" / "gone.png"
    for digest in (state_of, content_of):
        without = digest([link])
        assert without != digest([folder / "photos" / "a.png"])
        (folder / "photos" / "nothing.png").write_bytes(b"x")
        assert digest([link]) != without
        (folder / "photos" / "nothing.png").unlink()
        with pytest.raises(DataError, match="nothing.png, which the recipe names, cannot be read"):
            digest([folder / "photos" / "nothing.png"])
