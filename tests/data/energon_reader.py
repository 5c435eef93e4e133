"""Opens a directory with megatron-energon and prints what its samples hold, as JSON.

A program of its own: energon may live in another Python (GHOSTVIS_ENERGON_PYTHON). Prints
{"samples": {key: {part: sha256}}, "stored": {...}}, first by one pass over the split "val", then by
random access through index.sqlite.
"""

import hashlib
import json
import sys

from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    SkipSample,
    WorkerConfig,
    get_loader,
    get_val_dataset,
    stateless,
)
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import SqliteITarEntryReader


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parts(sample: dict) -> dict[str, str]:
    names = [name for name in sample if not name.startswith("__")]
    if not names:
        raise SkipSample
    return {name: digest(sample[name]) for name in names}


@stateless
def cook(sample: dict) -> CrudeSample:
    return CrudeSample(
        {name: value for name, value in sample.items() if name.startswith("__")}
        | {"parts": parts(sample)}
    )


class Encoder(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(cook)]

    def batch(self, samples: list) -> list:
        return samples


def main(path: str) -> None:
    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(
        path, split_part="val", worker_config=worker, batch_size=1, task_encoder=Encoder()
    )
    samples = {one["__key__"]: one["parts"] for batch in get_loader(dataset) for one in batch}
    reader = SqliteITarEntryReader(EPath(path), key_is_full_entryname=True)
    names = [f"{key}.{part}" for key in samples for part in samples[key]]
    stored = {name: digest(reader[name][0]) for name in names}
    print(json.dumps({"samples": samples, "stored": stored}))


if __name__ == "__main__":
    main(sys.argv[1])
