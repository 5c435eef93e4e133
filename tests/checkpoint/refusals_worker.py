"""One rank of the launch in which checkpoints are refused: of other models, and seen by some only.

Two pipeline stages, so that no rank knows all parameters of a model by itself.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.checkpoint.store import CheckpointStore, load_weights
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.certify import problem
from ghostvis_mega.utils.errors import CheckpointError
from ghostvis_mega.utils.files import canonical_json
from tests.checkpoint.state import differing, raw_state
from tests.launch import write_result

WORLD = 2
LAST = WORLD - 1
TEXT_ONLY = {"vision": None, "connector": None}
MODELS: dict[str, dict[str, Any]] = {
    "same": {},
    "fewer layers": {"llm": {"num_layers": 2}},
    "more layers": {"llm": {"num_layers": 6}},
    "no bias": {"llm": {"qkv_bias": False}},
    "two fields": {"llm": {"rope_base": 500.0}, "vision": {"feature_layer": -2}},
    "larger pictures": {"vision": {"image_size": 32}},
    "text only": TEXT_ONLY,
}
"""Models that are offered the weights of the first, as changes to it."""


class Bench:
    """The processes and what they share."""

    def __init__(self, folder: Path, own: Path):
        self.folder, self.own, self.rank = folder, own, dist.get_rank()

    def engine(self, model: dict[str, Any]) -> TrainEngine:
        parallel = {"parallel": {"pipeline": 2}}
        run = problem.make_run(self.own, model=model, **parallel)
        groups = build_groups(Degrees.of(run, world_size=WORLD), seed=1)
        return TrainEngine(run, groups, device=torch.device("cpu"))

    def told(self, action: Callable[[], object]) -> list[str]:
        """What each rank is told."""
        try:
            action()
            answer = "accepted"
        except CheckpointError as error:
            answer = str(error)
        gathered: list[str] = [""] * WORLD
        dist.all_gather_object(gathered, answer)
        return gathered


def other_models(bench: Bench, source: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    nameless = bench.folder / "nameless"
    if bench.rank == 0:
        forget_layout(source, nameless)
    dist.barrier()
    for name, model in MODELS.items():
        engine = bench.engine(model)
        before = raw_state(engine) if name == "fewer layers" else {}
        results[name] = bench.told(lambda engine=engine: load_weights(source, engine))
        if name == "fewer layers":
            results["by name"] = bench.told(lambda engine=engine: load_weights(nameless, engine))
            results["unchanged"] = not differing(before, raw_state(engine))
            results["its tower"] = bench.told(
                lambda engine=engine: load_weights(source, engine, modules=("vision",))
            )
        if name == "same":
            results["no such part"] = bench.told(
                lambda engine=engine: load_weights(source, engine, modules=("llm", "resampler"))
            )
        destroy_groups()
    text = bench.engine(TEXT_ONLY)
    path = CheckpointStore(bench.folder / "text", keep=1).save(text, step=1, extra={})
    destroy_groups()
    engine = bench.engine({})
    results["from text only"] = bench.told(lambda: load_weights(path, engine))
    results["tower from text only"] = bench.told(
        lambda: load_weights(path, engine, modules=("llm", "vision"))
    )
    destroy_groups()
    return results


def forget_layout(source: Path, copy: Path) -> None:
    """A checkpoint whose settings fit the smaller model, though its parameters do not."""
    copy.mkdir()
    for file in source.iterdir():
        if file.name != "manifest.json":
            os.link(file, copy / file.name)
    document = json.loads((source / "manifest.json").read_text())
    document["layout"]["model.llm.num_layers"] = 2
    write_document(copy, document)


def write_document(folder: Path, document: dict[str, Any]) -> None:
    """A sound manifest of this content."""
    del document["digest"]
    document["digest"] = hashlib.sha256(canonical_json(document)).hexdigest()
    (folder / "manifest.json").write_bytes(canonical_json(document))


def some_ranks_only(bench: Bench, source: Path) -> dict[str, Any]:
    """One rank sees nothing, something older, or loses a file after all were verified."""
    engine = bench.engine({})
    store = CheckpointStore(bench.folder / "unused", keep=1)
    stale = bench.folder / "stale"
    if bench.rank == LAST:
        stale.mkdir()
        for file in source.iterdir():
            os.link(file, stale / file.name)
        document = json.loads((stale / "manifest.json").read_text())
        (stale / "manifest.json").unlink()
        write_document(stale, document | {"step": 1})
    on_last = bench.rank == LAST
    nothing = bench.folder / "nothing" if on_last else source
    older = stale if on_last else source
    results = {
        "nothing": bench.told(lambda: store.load(nothing, engine)),
        "nothing, weights": bench.told(lambda: load_weights(nothing, engine)),
        "older": bench.told(lambda: store.load(older, engine)),
        "older, weights": bench.told(lambda: load_weights(older, engine)),
    }
    for name, part, action in (
        ("read", "read", store.load),
        ("read for weights", "read", load_weights),
        ("random_state", "random_state", store.load),
    ):
        original = getattr(CheckpointReader, part)
        if on_last:
            setattr(CheckpointReader, part, fail)
        results[name] = bench.told(lambda action=action: action(source, engine))
        setattr(CheckpointReader, part, original)
    results["afterwards"] = bench.told(lambda: store.load(source, engine))
    destroy_groups()
    return results


def fail(*_: object, **__: object) -> None:
    raise CheckpointError("this file went away")


def main() -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    apply_cpu_shim()
    dist.init_process_group("gloo")
    folder = Path(os.environ["LAUNCH_FOLDER"])
    own = folder / f"rank{dist.get_rank()}"
    own.mkdir()
    bench = Bench(folder, own)
    engine = bench.engine({})
    source = CheckpointStore(folder / "source", keep=1).save(engine, step=2, extra={})
    destroy_groups()
    results = other_models(bench, source) | some_ranks_only(bench, source)
    if bench.rank == 0:
        write_result(results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
