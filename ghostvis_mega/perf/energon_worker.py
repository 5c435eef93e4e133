"""Times megatron-energon on one export; a program for a Python that has it, never imported here.

energon_worker.py EXPORT TAR_FOLDER SIDE BATCH WORKERS prints one JSON object on its last line.
Pictures are decoded by energon's own decoder to RGB, then resized as our loader does.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    SampleDecoder,
    WorkerConfig,
    get_loader,
    get_val_dataset,
    stateless,
)
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from PIL import Image

SIDE = int(sys.argv[3])


@stateless
def cook(sample: dict[str, Any]) -> CrudeSample:
    """Resize the decoded picture; uint8 [3, SIDE, SIDE]."""
    pixels_HWC = np.asarray(sample["jpg"].resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    kept = {name: value for name, value in sample.items() if name.startswith("__")}
    pixels = torch.from_numpy(np.array(pixels_HWC.transpose(2, 0, 1), order="C"))
    return CrudeSample(kept | {"pixels": pixels})


class Pixels(DefaultTaskEncoder):
    """Batches of pixels alone."""

    decoder = SampleDecoder(image_decode="pilrgb")
    cookers = [Cooker(cook)]

    def batch(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """uint8 [n, 3, SIDE, SIDE]."""
        return torch.stack([sample["pixels"] for sample in samples])


def load(export: str, *, batch_size: int, workers: int) -> dict[str, float]:
    """Best CPU and wall seconds of two passes; CPU without that of worker processes."""
    cpu, wall, images = [], [], 0
    for _ in range(2):
        dataset = get_val_dataset(
            export,
            split_part="val",
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
            batch_size=batch_size,
            task_encoder=Pixels(),
        )
        loader = get_loader(dataset)
        images = 0
        began_cpu, began = time.process_time(), time.perf_counter()
        for pixels in loader:
            if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, SIDE, SIDE):
                raise ValueError(f"a batch is {pixels.dtype} {tuple(pixels.shape)}")
            images += len(pixels)
        cpu.append(time.process_time() - began_cpu)
        wall.append(time.perf_counter() - began)
    return {"images": images, "cpu_s": min(cpu), "wall_s": min(wall)}


def prepare(folder: Path) -> dict[str, float]:
    """CPU seconds, children's included, of what `energon prepare` does to the folder's tars."""
    began = sum(os.times()[:4])
    WebdatasetPreparator.prepare_dataset(
        folder,
        sorted(path.name for path in folder.glob("*.tar")),
        split_parts_ratio=[("train", 1.0)],
        workers=1,
    )
    spent = sum(os.times()[:4]) - began
    info = json.loads((folder / ".nv-meta" / ".info.json").read_bytes())
    return {"samples": sum(info["shard_counts"].values()), "cpu_s": spent}


def main() -> None:
    """Measure all and print it."""
    export, tars, _, batch_size, workers = sys.argv[1:]
    torch.set_num_threads(1)
    found = {
        "one_process": load(export, batch_size=int(batch_size), workers=0),
        "workers": load(export, batch_size=int(batch_size), workers=int(workers)),
        "prepare": prepare(Path(tars)),
    }
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
