"""The content of a dataset against what must have made it: pictures, records, spans, text."""

import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ghostvis_mega.data.dataset import Dataset
from ghostvis_mega.data.layout import ImageFormat, Role, shard_name
from ghostvis_mega.data.manifest import REJECTS
from ghostvis_mega.data.order import shuffled
from ghostvis_mega.data.pixels import ImageError, probe
from ghostvis_mega.data.recover import turns_of
from ghostvis_mega.data.template import ChatTemplate, RowError, find_style
from ghostvis_mega.data.writer import content_hash
from ghostvis_mega.utils.errors import DataError

RETOKENISED = 2000
"""Samples whose text is encoded again."""

Progress = Callable[[str, int, int], None]
"""Called with what is being looked at, how much of it is done, and how much there is."""

_CHUNK_SAMPLES = 4096
_CHUNK_IMAGES = 256
_SHUFFLE_KEY = 6


def deep_problems(dataset: Dataset, *, progress: Progress, workers: int = 1) -> list[str]:
    """Contradictions inside a dataset whose bytes are as written; pictures in `workers` threads."""
    problems = _count_problems(dataset)
    problems += _sample_problems(dataset, progress)
    if not problems:  # the rest reads the samples again
        problems += _span_problems(dataset) + _text_problems(dataset, progress)
    return problems + _image_problems(dataset, progress, workers) + _tar_problems(dataset)


def _count_problems(dataset: Dataset) -> list[str]:
    """The manifest's totals against the index and the ledger."""
    counts, records = dataset.manifest.counts, dataset.sample_index
    with open(dataset.path / REJECTS, "rb") as file:
        rejected = sum(1 for _ in file)
    found = {
        "tokens": int(records["tok_len"].sum()),
        "trained_tokens": int(records["trained_len"].sum()),
        "rejected": rejected,
    }
    return [
        f"{dataset.path}: the manifest counts {getattr(counts, name)} {name}, there are {value}"
        for name, value in found.items()
        if getattr(counts, name) != value
    ]


def _span_problems(dataset: Dataset) -> list[str]:
    """Spans follow each other without overlap, and trained is only what the template trains."""
    records, spans = dataset.sample_index, dataset.spans
    said = [Role[role.upper()] for role in find_style(dataset.manifest.template.name).trained]
    owner = np.repeat(np.arange(len(records)), records["n_spans"])
    ends = spans["start"].astype(np.int64) + spans["len"]
    same = owner[1:] == owner[:-1]
    rules = {
        "overlap": np.append(same & (spans["start"][1:] < ends[:-1]), False),
        "go back to an earlier turn": np.append(
            same & (spans["turn"][1:] < spans["turn"][:-1]), False
        ),
        "train text that is no answer": (spans["train"] != 0)
        & ~np.isin(spans["role"], [int(role) for role in (*said, Role.EOS, Role.TEXT)]),
    }
    return [
        f"{dataset.path}: sample {owner[wrong][0]}: its spans {rule}"
        for rule, wrong in rules.items()
        if wrong.any()
    ]


def _text_problems(dataset: Dataset, progress: Progress) -> list[str]:
    """Text of some samples, encoded again with the dataset's own tokenizer and template."""
    template = ChatTemplate(dataset.tokenizer, dataset.manifest.template.name)
    chosen = shuffled(dataset.num_samples, 0, _SHUFFLE_KEY)[:RETOKENISED].tolist()
    problems = []
    for number, index in enumerate(chosen, 1):
        sample = dataset.sample(index)
        progress("texts", number, len(chosen))
        if (sample.spans["role"] == Role.TEXT).any():
            continue  # parts of a long document end anywhere, so encoding them gives other tokens
        try:
            encoded = template.encode(
                turns_of(dataset.tokenizer, sample), num_images=len(sample.image_ids)
            )
        except RowError as error:
            problems.append(f"{dataset.path}: sample {index} ({sample.key}): {error}")
            continue
        if (
            not np.array_equal(encoded.tokens, sample.tokens)
            or encoded.spans.tobytes() != sample.spans.tobytes()
            or encoded.image_positions != sample.image_positions
        ):
            problems.append(
                f"{dataset.path}: sample {index} ({sample.key}): its text gives other tokens or "
                "spans with the dataset's tokenizer and template: ingest the data again"
            )
    return problems


def _image_problems(dataset: Dataset, progress: Progress, workers: int) -> list[str]:
    """Every picture decodes, and is what its record says."""
    problems: list[str] = []
    with ThreadPoolExecutor(workers) as pool:  # decoding lets other threads run
        for start in range(0, dataset.num_images, _CHUNK_IMAGES):
            chunk = range(start, min(start + _CHUNK_IMAGES, dataset.num_images))
            for found in pool.map(lambda image_id: _image_problem(dataset, image_id), chunk):
                problems += found
            progress("images", chunk.stop, dataset.num_images)
    return problems


def _image_problem(dataset: Dataset, image_id: int) -> list[str]:
    """What is wrong with one picture."""
    where, record = f"{dataset.path}: image {image_id}", dataset.image_index[image_id]
    try:
        data = dataset.image_bytes(image_id)
        info = probe(data)
    except (ImageError, DataError) as error:
        return [f"{where}: {error}"]
    problems = []
    found = (info.format, info.width, info.height, info.orientation, info.channels, info.bits)
    fields = ("format", "width", "height", "orientation", "channels", "mode")
    stored = tuple(int(record[field]) for field in fields)
    if stored != found:
        problems.append(f"{where}: its record says {stored}, its bytes say {found}")
    if content_hash(data) != record["blake2b"].tobytes():
        problems.append(f"{where}: its content hash is not its record's")
    return problems


def _sample_problems(dataset: Dataset, progress: Progress) -> list[str]:
    """Reads every sample through the checks of `Dataset.gather`, and every key."""
    problems = []
    trained_len = dataset.sample_index["trained_len"]
    for start in range(0, dataset.num_samples, _CHUNK_SAMPLES):
        indices = np.arange(start, min(start + _CHUNK_SAMPLES, dataset.num_samples))
        try:
            data = dataset.gather(indices)
            for index in indices.tolist():
                dataset.sample_key(index)
        except DataError as error:
            problems.append(str(error))
            continue
        progress("samples", int(indices[-1]) + 1, dataset.num_samples)
        starts = np.cumsum(data.tok_lens) - data.tok_lens
        trained = np.add.reduceat(data.trained, starts) - data.trained[starts]
        wrong = np.flatnonzero(trained != trained_len[indices])
        problems += [
            f"{dataset.path}: sample {indices[place]}: its record counts other trained tokens"
            for place in wrong.tolist()
        ]
    return problems


def _tar_problems(dataset: Dataset) -> list[str]:
    """The shards are ordinary tars whose members are the images, in the order of their ids."""
    index = dataset.image_index
    problems = []
    for shard in np.unique(index["shard"]).tolist():
        path = dataset.path / shard_name(shard)
        image_ids = np.flatnonzero(index["shard"] == shard)
        names = [
            f"{image_id:08d}.{ImageFormat(int(index['format'][image_id])).extension}"
            for image_id in image_ids.tolist()
        ]
        try:
            with tarfile.open(path, "r:") as tar:
                members = tar.getmembers()
        except tarfile.TarError as error:
            problems.append(f"{path} is not a tar: {error}")
            continue
        expected = list(zip(names, index["offset"][image_ids].tolist(), strict=True))
        if [(member.name, member.offset_data) for member in members] != expected:
            problems.append(f"{path}: its members are not the images of the index")
        offsets = np.fromfile(path.with_name(path.name + ".idx"), dtype="<u8").tolist()
        if offsets[:-1] != [member.offset for member in members]:
            problems.append(f"{path}.idx does not point at the members of the tar")
    return problems
