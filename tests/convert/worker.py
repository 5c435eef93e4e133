"""One rank: every layout loads an imported model, answers, saves and exports while it runs."""

import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ghostvis_mega.checkpoint.manifest import read_manifest
from ghostvis_mega.checkpoint.store import CheckpointStore, load_weights
from ghostvis_mega.convert.assets import Assets
from ghostvis_mega.convert.exporter import ExportOptions
from ghostvis_mega.convert.hf_config import model_of_parts
from ghostvis_mega.convert.native import parts_of_layout
from ghostvis_mega.convert.online import export_online
from ghostvis_mega.convert.tensor_file import TensorFileWriter
from ghostvis_mega.engine.decode import GreedyDecoder, Prompt
from ghostvis_mega.engine.step import TrainEngine
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.groups import build_groups, destroy_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.perf.certify import problem
from ghostvis_mega.utils.errors import CheckpointError
from tests.convert.sharded import FORMS, IMAGE, MODELS, NEW_TOKENS, PROMPTS, pictures
from tests.launch import fork_ranks, write_result

WORLD = 4
TEXT_OPTIONS = ExportOptions(assets=Assets(tokens={"eos": 2, "pad": 0}))
OPTIONS = ExportOptions(assets=Assets(tokens={"image": IMAGE, "eos": 2, "pad": 0}))


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    name: str
    model: str
    stage: int = 1
    sections: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("dp4", "untied"),
    Case("tp2-dp2", "untied", sections={"parallel": {"tensor": 2, "sequence_parallel": False}}),
    Case("tp2-pp2", "untied", sections={"parallel": {"tensor": 2, "pipeline": 2}}),
    Case(
        "pp2-interleaved",
        "untied",
        stage=2,
        sections={"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    ),
    Case(
        "tp2-pp2-interleaved",
        "untied",
        sections={"parallel": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}},
    ),
    Case("dp4-zero3", "untied", stage=3),
    Case("tied-dp4", "tied"),
    Case("tied-tp2-pp2", "tied", sections={"parallel": {"tensor": 2, "pipeline": 2}}),
]


SPLITS = {
    "dp4": {},
    "tp2-dp2": {"tensor": 2},
    "pp2-dp2": {"pipeline": 2},
    "tp2-pp2-interleaved": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
}
FORM_CASES = [
    Case(f"{kind}-{name}", kind, sections={"parallel": split})
    for kind in FORMS
    for name, split in SPLITS.items()
]


def form_options(kind: str) -> ExportOptions:
    """Of an export of this model: one of text has no picture's token."""
    return TEXT_OPTIONS if kind == "text" else OPTIONS


def measure_form(case: Case, folder: Path, own: Path) -> dict[str, Any]:
    """Save and export a model of another form as it was imported."""
    native = folder / f"{case.model}-native"
    model = model_of_parts(parts_of_layout(read_manifest(native).layout, native))
    assert model is not None
    run = problem.make_run(own, model=model.model_dump(mode="json"), **case.sections)
    engine = TrainEngine(
        run, build_groups(Degrees.of(run, world_size=WORLD), seed=1), device=torch.device("cpu")
    )
    load_weights(native, engine)
    saved = CheckpointStore(folder / case.name, keep=9).save(engine, step=0, extra={})
    out, options = folder / f"{case.name}-online", form_options(case.model)
    export_online(engine, out, options, step=0, sequences=0)
    engine.close()
    destroy_groups()
    return {"saved": str(saved), "seconds": 0.0}


def measure(case: Case, folder: Path, own: Path) -> dict[str, Any]:
    began = time.perf_counter()
    sections = problem.merge(
        {
            "model": MODELS[case.model],
            "data": {"seq_length": 96, "packing": False},
            "batch": {"micro_size": 2},
        },
        case.sections,
    )
    run = problem.make_run(own, stage=case.stage, **sections)
    groups = build_groups(Degrees.of(run, world_size=WORLD), seed=1)
    engine = TrainEngine(run, groups, device=torch.device("cpu"))
    load_weights(folder / f"{case.model}-native", engine)
    decoder = GreedyDecoder(
        engine,
        image_token=IMAGE,
        stop_token=2,
        vocab_size=157,
        load_pixels=lambda ids: pictures()[list(ids)],
        rows=4,
    )
    prompts = [Prompt(tokens=tuple(tokens), image_ids=ids) for tokens, ids in PROMPTS]
    answers = decoder.answers(prompts, max_new_tokens=NEW_TOKENS)
    result: dict[str, Any] = {"answers": answers}
    store = CheckpointStore(folder / case.name, keep=9)
    result["saved"] = str(store.save(engine, step=0, extra={}))
    export_online(engine, folder / f"{case.name}-online", OPTIONS, step=0, sequences=0)
    rows, shown = problem.make_rows(run, kind="mixed", step=1)
    engine.step(problem.step_input(run, groups, rows, shown), step=1)
    result["trained"] = str(store.save(engine, step=1, extra={}))
    export_online(
        engine, folder / f"{case.name}-trained-online", OPTIONS, step=1, sequences=problem.ROWS
    )
    if case.name == "tp2-pp2":
        result["failures"] = failures(engine, folder)
    destroy_groups()
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def failures(engine: TrainEngine, folder: Path) -> dict[str, list[str]]:
    """What all ranks are told of failures of the first, and of none; nobody waits for ever."""

    def export(name: str, options: ExportOptions = OPTIONS) -> list[str]:
        # Many buckets: the others send most of them after the first rank has failed.
        out = folder / name
        return refusal(
            lambda: export_online(engine, out, options, step=0, sequences=0, bucket_bytes=1 << 14)
        )

    told = {
        "existing": export("tp2-pp2-online"),
        "format": export("new", ExportOptions(format="gguf", assets=OPTIONS.assets)),
        "none": export("new"),
    }
    whole = TensorFileWriter.write
    TensorFileWriter.write = full_disk
    told["disk"] = export("another")
    TensorFileWriter.write = whole
    return told


def full_disk(self: TensorFileWriter, name: str, chunks: Any) -> None:
    """In the place of `TensorFileWriter.write`."""
    next(chunks)
    raise OSError(28, "No space left on device")


def refusal(action) -> list[str]:
    try:
        action()
        said = "accepted"
    except CheckpointError as error:
        said = str(error)
    gathered: list[Any] = [None] * WORLD
    dist.all_gather_object(gathered, said)
    return gathered


def main() -> None:
    for name in ("DeepSpeed", "ghostvis_mega"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    apply_cpu_shim()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    folder = Path(sys.argv[1])
    own = Path(os.environ["LAUNCH_FOLDER"]) / f"rank{rank}"
    own.mkdir()
    results = {}
    chosen = sys.argv[2:]
    for case in (c for c in (*CASES, *FORM_CASES) if not chosen or c.name in chosen):
        take = measure if case.model in MODELS else measure_form
        results[case.name] = take(case, folder, own)
        if rank == 0:
            print(json.dumps({case.name: results[case.name]["seconds"]}), flush=True)
    if rank == 0:
        write_result(results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_ranks(main, WORLD)
