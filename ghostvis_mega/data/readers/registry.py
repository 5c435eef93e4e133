"""Input formats by name: what each needs, and the rows and texts it gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ghostvis_mega.data.ingest import BadRow, Row, Source, TokenRow
from ghostvis_mega.data.readers import easy_vqa, llava, megatron, text, vqa, webdataset
from ghostvis_mega.data.readers.meter import Meter, Meters, size_of
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import sha256_file

_EASY_VQA_BYTES = 4_000_000
"""What its questions would take as JSON."""

Rows = Iterator[Row | TokenRow | BadRow]


class SourceSpec(BaseModel):
    """One input, as a recipe or a command line describes it.

    Args:
        path: file of rows, or folder.
        images: folder of the pictures.
        annotations: second file (vqav2).
        split: split of a packaged dataset (easy-vqa).
        limit: take the first rows only.
        prompt: question that captions answer.
        tokenizer: the file that `ingest` is given; token ids (megatron) must be its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    path: Path | None = None
    images: Path | None = None
    annotations: Path | None = None
    split: str = "train"
    limit: int | None = Field(default=None, ge=1)
    prompt: str = vqa.CAPTION_PROMPT
    tokenizer: Path | None = None
    name: str | None = None
    license: str = ""

    def file(self) -> Path:
        """The file of rows; DataError if none is named."""
        if self.path is None:
            raise DataError(f"the format {self.format} needs a file of rows")
        return self.path


@dataclass(frozen=True)
class Format:
    """A reader: rows of an input, and a line of help."""

    rows: Callable[[SourceSpec, Meter], Rows]
    help: str


def _vqav2(spec: SourceSpec, meter: Meter) -> Rows:
    if spec.annotations is None:
        raise DataError("the format vqav2 needs the annotations file as well: --annotations")
    return vqa.vqav2_rows(
        spec.file(), annotations=spec.annotations, images=spec.images, limit=spec.limit, meter=meter
    )


def _megatron(spec: SourceSpec, meter: Meter) -> Rows:
    if spec.tokenizer is None or not spec.tokenizer.is_file():
        raise DataError("the format megatron needs the tokenizer file that made its token ids")
    sha256 = sha256_file(spec.tokenizer)
    return megatron.megatron_rows(
        spec.file(), tokenizer_sha256=sha256, limit=spec.limit, meter=meter
    )


FORMATS: dict[str, Format] = {
    "easy-vqa": Format(
        lambda spec, meter: easy_vqa.easy_vqa_rows(spec.split, limit=spec.limit, meter=meter),
        "pictures and questions of the easy-vqa package",
    ),
    "llava": Format(
        lambda spec, meter: llava.llava_rows(
            spec.file(), image_folder=spec.images, limit=spec.limit, meter=meter
        ),
        "LLaVA / ShareGPT conversations, JSON or JSON lines",
    ),
    "coco-captions": Format(
        lambda spec, meter: vqa.coco_caption_rows(
            spec.file(), images=spec.images, limit=spec.limit, meter=meter, prompt=spec.prompt
        ),
        "captions_train2017.json of COCO",
    ),
    "vqav2": Format(_vqav2, "VQAv2 questions, with --annotations"),
    "textvqa": Format(
        lambda spec, meter: vqa.textvqa_rows(
            spec.file(), images=spec.images, limit=spec.limit, meter=meter
        ),
        "TextVQA_0.5.1_train.json",
    ),
    "chartqa": Format(
        lambda spec, meter: vqa.chartqa_rows(
            spec.file(), images=spec.images, limit=spec.limit, meter=meter
        ),
        "train_human.json of ChartQA",
    ),
    "chat": Format(
        lambda spec, meter: text.chat_rows(spec.file(), limit=spec.limit, meter=meter),
        "SmolTalk-style `messages`: parquet, JSON or JSON lines, or a folder of them",
    ),
    "text": Format(
        lambda spec, meter: text.text_rows(spec.file(), limit=spec.limit, meter=meter),
        "documents: .txt, .md, or a column `text` (parquet, JSON, JSON lines), or a folder of them",
    ),
    "csv": Format(
        lambda spec, meter: text.csv_rows(
            spec.file(), images=spec.images, limit=spec.limit, meter=meter, prompt=spec.prompt
        ),
        "a CSV file beside its pictures",
    ),
    "webdataset": Format(
        lambda spec, meter: webdataset.webdataset_rows(
            spec.file(), prompt=spec.prompt, limit=spec.limit, meter=meter
        ),
        "tars of KEY.jpg with KEY.json or KEY.txt: a file or a folder of them",
    ),
    "megatron": Format(_megatron, "text of Megatron's PREFIX.bin and PREFIX.idx"),
}


def find_format(name: str) -> Format:
    """The format called `name`; DataError naming all of them."""
    if name not in FORMATS:
        raise DataError(f"there is no input format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


_USED: dict[str, tuple[str, ...]] = {
    "easy-vqa": ("split",),
    "llava": ("path", "images"),
    "coco-captions": ("path", "images", "prompt"),
    "vqav2": ("path", "images", "annotations"),
    "textvqa": ("path", "images"),
    "chartqa": ("path", "images"),
    "chat": ("path",),
    "text": ("path",),
    "csv": ("path", "images", "prompt"),
    "webdataset": ("path", "prompt"),
    "megatron": ("path",),
}
"""Settings that each format reads, of those that not all do."""


def check_settings(spec: SourceSpec) -> None:
    """Refuse a setting that the format does not read: whoever gives one expects something of it.

    Raises:
        DataError: naming the setting.
    """
    find_format(spec.format)
    fields = SourceSpec.model_fields
    for name in ("path", "images", "annotations", "split", "prompt"):
        value = getattr(spec, name)
        if name not in _USED[spec.format] and value != fields[name].default:
            what = "the input path" if name == "path" else f"{name} (--{name})"
            raise DataError(
                f"the format {spec.format} has no use for {what}, here {str(value)!r}: leave it out"
            )


def open_source(spec: SourceSpec, meters: Meters | None = None) -> Source:
    """The input as a source for `ingest`; rows are read when they are asked for.

    `meters` gets a part that tells how much has been read.
    """
    meter = (meters or Meters()).part(_weight(spec))
    rows = _at_least_one(find_format(spec.format).rows(spec, meter), spec)
    if spec.format == "easy-vqa":
        name, licence = f"{easy_vqa.NAME}/{spec.split}", spec.license or "MIT"
    else:
        name, licence = spec.file().stem, spec.license
    return Source(name=spec.name or name, rows=rows, license=licence)


def _at_least_one(rows: Rows, spec: SourceSpec) -> Rows:
    """The rows; DataError if there are none: a wrong path must not look like success."""
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        what = FORMATS[spec.format].help
        raise DataError(f"{spec.path} has no row; the format {spec.format} reads {what}")


def _weight(spec: SourceSpec) -> int:
    """Size of an input, to compare it with others: bytes of its rows."""
    if spec.format == "easy-vqa" or spec.path is None:
        return _EASY_VQA_BYTES
    if spec.format == "megatron":
        return max(1, size_of(spec.path.with_name(spec.path.name + ".bin")))
    return max(1, size_of(spec.path))


def source_text(spec: SourceSpec) -> Iterator[str]:
    """All text of an input, for a tokenizer; rows that cannot be read are passed over."""
    if spec.format == "easy-vqa":
        yield from easy_vqa.easy_vqa_text(spec.split)
    elif spec.format == "llava":
        yield from llava.llava_text(spec.file())
    else:
        for row in find_format(spec.format).rows(spec, Meter()):
            if isinstance(row, Row):
                yield from (turn.text for turn in row.turns)
