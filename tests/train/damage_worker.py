"""Two tensor-parallel ranks of one replica; what only the second cannot read, both leave out."""

import sys

import torch
import torch.distributed as dist

from ghostvis_mega.data.batch import Damage, GlobalBatch, ImageSlot, MicroBatch, SequenceMeta
from ghostvis_mega.engine.step import StepInput
from ghostvis_mega.parallel.cpu_shim import apply_cpu_shim
from ghostvis_mega.parallel.dispatch import dispatch_images
from ghostvis_mega.parallel.groups import build_groups
from ghostvis_mega.parallel.plan import Degrees
from ghostvis_mega.parallel.windows import PictureWindow
from ghostvis_mega.train.damage import agree_on_damage
from tests.launch import write_result

IMAGES = {0: [], 1: [7], 2: [], 3: [8], 4: [7, 8]}
"""Pictures of each sample; every sample has 4 positions, of which 2 are trained."""


class Index:
    """The two questions that are asked of a corpus."""

    def images_of(self, sample: int) -> list[int]:
        return IMAGES[sample]

    def trained_tokens(self, sample: int, piece: object = None) -> int:
        assert piece is None, "nothing here is cut"
        return 2


def micro_batch(samples: tuple[int, ...]) -> MicroBatch:
    length = 4 * len(samples) + 2
    weights = torch.zeros(1, length)
    weights[0, : 4 * len(samples)] = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(len(samples))
    bounds = [*range(0, 4 * len(samples) + 1, 4), length]
    zeros = torch.zeros(1, length, dtype=torch.int64)
    return MicroBatch(
        tokens_BS=zeros,
        labels_BS=zeros,
        weights_BS=weights,
        positions_BS=zeros,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=4,
        images=tuple(ImageSlot(image, 0, 0) for s in samples for image in IMAGES[s]),
        sample_ids=samples,
    )


def main() -> None:
    apply_cpu_shim()
    dist.init_process_group("gloo")
    degrees = Degrees(world_size=2, tensor=2, pipeline=1, virtual_pipeline=1, context=1, data=1)
    groups = build_groups(degrees, seed=0)
    packs = ((0, 1, 2), (3, 4))
    rows = tuple(
        (SequenceMeta(p, 4 * len(p), 2 * len(p), tuple(i for s in p for i in IMAGES[s])),)
        for p in packs
    )
    batch = GlobalBatch(step=0, epochs=(0,), replicas=(rows,))
    results = {}
    for name, damage in {
        "nothing": Damage(),
        "a sample": Damage(samples=frozenset({2})),
        "a picture": Damage(images=frozenset({7})),
        "everything": Damage(samples=frozenset(IMAGES)),
    }.items():
        work = StepInput(
            micro_batches=[micro_batch(p) for p in packs],
            windows=[
                PictureWindow(
                    num_micro_batches=2,
                    dispatch=dispatch_images([[7, 8]], groups.places),
                    pixels_N3hw=torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
                )
            ],
            trained_tokens=10,
            damage=damage if groups.rank == 1 else Damage(),
        )
        agreed = agree_on_damage(batch, work, Index(), groups, device=torch.device("cpu"))
        mine = [agreed.trained_tokens, *(m.weights_BS.tolist() for m in agreed.micro_batches)]
        both: list[object] = [None, None]
        dist.all_gather_object(both, mine)
        results[name] = both
    if groups.rank == 0:
        write_result(results)


if __name__ == "__main__":
    sys.exit(main())
