"""Every place where a file from outside is read, as functions of its path.

A door refuses by raising a GhostVisError. Readers of rows refuse single rows: there, a file in
which not one row is good counts as refused, and the reasons are the message.
"""

from dataclasses import dataclass
from pathlib import Path

from ghostvis_mega.checkpoint.folder import CheckpointFolder, open_complete
from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.images import load_image
from ghostvis_mega.data.ingest import dry_run
from ghostvis_mega.data.pixels import probe
from ghostvis_mega.data.readers.registry import SourceSpec, open_source
from ghostvis_mega.data.recipe import load_recipe
from ghostvis_mega.data.template import load_tokenizer
from ghostvis_mega.generate.prompts import read_picture, read_prompts
from ghostvis_mega.generate.sampling import Sampling
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.utils.errors import CheckpointError, DataError


@dataclass
class Doors:
    """The doors, with what they need beside the file.

    Args:
        tokenizer: A sound tokenizer file.
        images: A folder of pictures that rows may name.
        out: Where a door may write.
    """

    tokenizer: Path
    images: Path
    out: Path

    def settings(self, path: Path) -> None:
        """A run's YAML, and the DeepSpeed file that it names."""
        load_checked(path, world_size=1, device="cpu")

    def recipe(self, path: Path) -> None:
        """A recipe's YAML."""
        load_recipe(path)

    def tokenizer_file(self, path: Path) -> None:
        """A tokenizer of any of the three kinds."""
        load_tokenizer(path)

    def rows(self, path: Path) -> None:
        """Input of `ingest`; the format is the name of the file's folder."""
        kind = path.parent.name
        pictures = self.images if kind in ("llava", "csv", "textvqa") else None
        own = self.tokenizer if kind == "megatron" else None
        source = open_source(SourceSpec(format=kind, path=path, images=pictures, tokenizer=own))
        report = dry_run([source], tokenizer=load_tokenizer(self.tokenizer))
        if report.samples == 0:
            raise DataError(f"{path}: not one good row: {report.rejected}")

    def picture(self, path: Path) -> None:
        """A picture as `ingest` decodes it."""
        probe(path.read_bytes())

    def picture_again(self, path: Path) -> None:
        """A picture as training and generation decode it."""
        load_image(path.read_bytes(), image_size=64, augment_seed=None)

    def dataset(self, path: Path) -> None:
        """A prepared dataset: opened, and its first sample and picture read."""
        opened = Dataset.open(path)
        _ = opened.tokenizer
        opened.sample(0)
        for image in range(opened.num_images):
            probe(opened.image_bytes(image))

    def checkpoint(self, path: Path) -> None:
        """A checkpoint by its path: verified, then every tensor read."""
        open_complete(path)
        with CheckpointReader(path) as reader:
            if damage := reader.damage(reader.files()):
                raise CheckpointError("; ".join(damage))
            for name in reader.manifest.parameters:
                reader.weight(name)

    def run_folder(self, path: Path) -> None:
        """The checkpoints of a run, of which the newest is wanted."""
        newest = CheckpointFolder(path).newest()
        if newest is not None:
            self.checkpoint(newest)

    def prompts(self, path: Path) -> None:
        """A file of prompts for `generate`, and the pictures that it names."""
        for prompt in read_prompts(path, system=None, sampling=Sampling()):
            for picture in prompt.images:
                read_picture(picture, prompt.where)

    def hugging_face(self, path: Path) -> None:
        """A model directory or a GGUF file from elsewhere."""
        import_hf([path], self.out / "imported", ImportOptions(force=True))
