"""Everything of an export that is no weight: tokenizer, chat template, processor, model card."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ghostvis_mega.convert.hf_config import Format, processor_patches
from ghostvis_mega.convert.hf_folder import CONFIG, read_json
from ghostvis_mega.convert.hf_template import GENERATION, HFChat, optional_json
from ghostvis_mega.convert.hf_tokenizer import (
    PROBES,
    chat_template,
    check_same_ids,
    to_tokenizer_json,
)
from ghostvis_mega.convert.mapping import Parts
from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.template import find_style, load_tokenizer
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json

log = logging.getLogger(__name__)

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_STATISTICS = {
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}
_BICUBIC = 3
"""Pillow's number."""
_COMPARED_TEXTS = 64


@dataclass(frozen=True)
class Assets:
    """Where tokenizer and template come from: a prepared dataset, a tokenizer file, or a directory
    of Hugging Face; none gives weights and settings alone."""

    data: Path | None = None
    tokenizer: Path | None = None
    template: str = "chatml"
    folder: Path | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Ids of specials that are told, beside those that are found."""


@dataclass(frozen=True)
class Found:
    """What assets say about tokens, and how to write them."""

    tokens: dict[str, int]
    """Ids of `image`, `bos`, `eos`, `pad`, as far as known."""
    image_piece: str
    stops: tuple[int, ...] = ()
    """What ends an answer; of `folder`, only where that is more than its settings say."""
    tokenizer: Tokenizer | None = None
    style: str = ""
    folder: Path | None = None
    texts: tuple[str, ...] = ()
    vocab_size: int = 0
    """Ids that the tokenizer has."""
    chat: str | None = None
    """Template of `folder`, to be written where a processor looks for it."""


def find_assets(assets: Assets) -> Found:
    """Open what assets name.

    Raises:
        CheckpointError: A file is missing.
        DataError: The dataset or the tokenizer is damaged.
    """
    told = dict(assets.tokens)
    if assets.folder is not None:
        return _from_folder(assets.folder, told)
    texts: tuple[str, ...] = ()
    if assets.data is not None:
        dataset = Dataset.open(assets.data)
        tokenizer, style = dataset.tokenizer, dataset.manifest.template.name
        texts = tuple(_texts(dataset))
    elif assets.tokenizer is not None:
        tokenizer = load_tokenizer(assets.tokenizer, template=assets.template)
        style = assets.template
    else:
        return Found(tokens=told, image_piece="<|image|>")
    specials = tokenizer.specials
    stops = [specials["im_end"]]
    if specials.get("endoftext", stops[0]) != stops[0]:
        stops.append(specials["endoftext"])
    tokens = {"image": specials["image"], "eos": stops[0], "pad": specials["pad"]}
    if "bos" in specials:
        tokens["bos"] = specials["bos"]
    return Found(
        tokens=tokens | told,
        image_piece=tokenizer.piece(specials["image"]),
        stops=tuple(stops),
        tokenizer=tokenizer,
        style=style,
        texts=texts,
        vocab_size=tokenizer.vocab_size,
    )


def _texts(dataset: Dataset) -> Iterator[str]:
    """Texts of some samples, to compare the two forms of the tokenizer on."""
    step = max(1, dataset.num_samples // _COMPARED_TEXTS)
    for index in range(0, dataset.num_samples, step):
        sample = dataset.sample(index)
        for span in sample.spans:
            start, length = int(span["start"]), int(span["len"])
            yield dataset.tokenizer.decode(sample.tokens[start : start + length].tolist())


def _from_folder(folder: Path, told: dict[str, int]) -> Found:
    config = read_json(folder / CONFIG)
    text = config.get("text_config", {})
    tokens: dict[str, int] = {}
    image = config.get("image_token_index", config.get("image_token_id"))
    if isinstance(image, int):
        tokens["image"] = image
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token_id", text.get(f"{name}_token_id"))
        if isinstance(value, int):
            tokens[name] = value
    tokens |= told
    piece = "<image>"
    if (folder / "processor_config.json").is_file():
        piece = read_json(folder / "processor_config.json").get("image_token", piece)
    elif (folder / "tokenizer.json").is_file() and "image" in tokens:
        content = read_json(folder / "tokenizer.json")
        added = {t["id"]: t["content"] for t in content.get("added_tokens", [])}
        piece = added.get(tokens["image"], piece)
    return Found(tokens=tokens, image_piece=piece, folder=folder)


def check_chat(found: Found, form: Format) -> Found:
    """What a directory's chat template is worth to a model of this form.

    Returns:
        With the token that ends an answer in the template among the stops.

    Raises:
        CheckpointError: The model sees pictures and the template cannot show one.
        DataError: The template fails on a question and its answer.
    """
    folder = found.folder
    if folder is None or form == "tower":
        return found
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        log.warning("%s holds no tokenizer, so none is written", folder)
        return found
    chat, pictures = HFChat(folder), form != "text"
    if pictures and (problem := chat.picture_problem(found.image_piece)):
        raise CheckpointError(
            f"{problem}, so nobody could ask the export about one: give --data with the dataset "
            f"that the model was trained on, or --tokenizer {folder / 'tokenizer.json'} with the "
            "--template of its data"
        )
    stops, end = chat.stops(), chat.end_token()
    if end is not None and end not in stops:
        log.info("%s: its chat template ends answers with %d, which now ends them", folder, end)
        found = replace(found, stops=(end, *stops))
    return replace(found, chat=chat.template) if pictures else found


def write_assets(
    folder: Path, found: Found, parts: Parts, form: Format, *, max_positions: int | None
) -> None:
    """Write tokenizer, template, generation settings and processor.

    Raises:
        CheckpointError: The tokenizer has no equal form, or the model has too few rows for it.
    """
    if found.folder is not None:
        for name in _COPIED:
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, folder / name)
        if found.chat is not None:
            # A processor does not look into tokenizer_config.json.
            (folder / "chat_template.jinja").write_text(found.chat, encoding="utf-8")
        if found.stops:
            settings = optional_json(found.folder / GENERATION)
            _write_json(folder / GENERATION, settings | {"eos_token_id": list(found.stops)})
    elif found.tokenizer is not None:
        if parts.llm is not None and found.vocab_size > parts.llm.vocab_size:
            raise CheckpointError(
                f"tokenizer {found.tokenizer.path} has {found.vocab_size} ids, the model only "
                f"{parts.llm.vocab_size}: it is another model's"
            )
        _write_tokenizer(folder, found, max_positions)
        if form == "text":
            _check_loaded(folder, found.tokenizer, [*PROBES, *found.texts])
    elif parts.llm is not None:
        log.warning("no tokenizer is written: name --data, --tokenizer or --assets for one")
    if parts.llm is not None and found.folder is None:
        eos = list(found.stops) or found.tokens.get("eos")
        known = {k: v for k, v in found.tokens.items() if k in ("bos", "pad")}
        settings = {"do_sample": False, "eos_token_id": eos}
        settings |= {f"{name}_token_id": value for name, value in known.items()}
        _write_json(folder / GENERATION, settings)
    if parts.vision is not None and form != "text":
        _write_processor(folder, found, parts, form)


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(canonical_json(value))


def _write_tokenizer(folder: Path, found: Found, max_positions: int | None) -> None:
    tokenizer = found.tokenizer
    assert tokenizer is not None
    converted = to_tokenizer_json(tokenizer)
    check_same_ids(tokenizer, converted, [*PROBES, *found.texts])
    (folder / "tokenizer.json").write_text(converted.to_str(pretty=True), encoding="utf-8")

    def piece(name: str) -> str | None:
        token = tokenizer.specials.get(name)
        return None if token is None else tokenizer.piece(token)

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": piece("bos"),
        "eos_token": piece("im_end"),
        "pad_token": piece("pad"),
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "model_max_length": max_positions,
        "padding_side": "left",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    template = chat_template(find_style(found.style), tokenizer)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _check_loaded(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    """What transformers makes of the files: for some text models it has a vocabulary's rules built
    in and reads only a part of them."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    try:
        check_same_ids(tokenizer, loaded.backend_tokenizer, texts)
    except CheckpointError as error:
        raise CheckpointError(
            f"transformers reads the tokenizer of such a model as {type(loaded).__name__}, "
            f"whatever its files say: {error}; or leave the tokenizer out"
        ) from error


def image_processor(parts: Parts) -> dict[str, Any]:
    """Settings of transformers' image processor that prepare pictures as training does.

    Pictures are resized to a square with their aspect given up, for CLIP as well: what a model
    has been trained on.
    """
    vision = parts.vision
    assert vision is not None
    mean, std = _STATISTICS[vision.kind]
    square = {"height": vision.image_size, "width": vision.image_size}
    kind = "Siglip" if vision.kind == "siglip" else "CLIP"
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": _BICUBIC,
        # Not used, but LLaVA's processor reads it to count placeholders.
        "crop_size": square,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _write_processor(folder: Path, found: Found, parts: Parts, form: Format) -> None:
    pictures = image_processor(parts)
    if form == "tower":
        _write_json(folder / "preprocessor_config.json", pictures)
        return
    patch, extra, strategy = processor_patches(parts, form)
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": found.image_piece,
        "patch_size": patch,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": extra,
    }
    # transformers 5 reads one file, earlier ones two.
    _write_json(folder / "processor_config.json", {**settings, "image_processor": pictures})
    _write_json(
        folder / "preprocessor_config.json", {**pictures, "processor_class": "LlavaProcessor"}
    )
