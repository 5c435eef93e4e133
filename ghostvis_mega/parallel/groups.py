"""The process groups of a run as one object that is passed around.

Megatron-Core's layers read its global `parallel_state`; it is initialised here and nowhere else.
Ranks are laid out as Megatron-Core does: tensor fastest, then context, then data, then
pipeline.
"""

import dataclasses
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from ghostvis_mega.model.context import ContextSlice
from ghostvis_mega.parallel.plan import Degrees

_NEEDED = ["tp", "pp", "cp", "tp_cp", "dp", "dp_cp", "embd", "pos_embd", "mp", "tp_dp_cp"]


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the LLM's grid."""

    data: int
    pipeline: int
    tensor: int
    context: int = 0


@dataclass(frozen=True)
class Groups:
    """Groups and coordinates of this rank."""

    degrees: Degrees
    rank: int
    place: Place
    places: tuple[Place, ...]
    """Of every rank of the world."""
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    """The ranks that share out the sequences of one replica."""
    data: dist.ProcessGroup
    """Data x context: all ranks that hold the same weights, over which gradients are averaged;
    context fastest."""
    model: dist.ProcessGroup
    """Tensor x pipeline: the ranks that together hold the LLM's weights once."""
    embedding: dist.ProcessGroup | None
    """First and last stage of this pipeline; None on stages between them."""
    world: dist.ProcessGroup
    alone: dist.ProcessGroup
    """This rank by itself."""
    megatron: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens and pictures."""
        return self.place.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.place.pipeline == self.degrees.pipeline - 1

    @property
    def context_slice(self) -> ContextSlice:
        """Which rows of each sequence this rank computes."""
        return ContextSlice(self.degrees.context, self.place.context)

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pipeline, self.degrees.pipeline - 1)


def build_groups(degrees: Degrees, *, seed: int) -> Groups:
    """Create all groups; every rank of the initialised default group must call this.

    Args:
        degrees: Layout; their product is the world's size.
        seed: Of Megatron-Core's random states (dropout, where a model has any).
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=degrees.tensor,
        pipeline_model_parallel_size=degrees.pipeline,
        virtual_pipeline_model_parallel_size=degrees.virtual_pipeline
        if degrees.virtual_pipeline > 1
        else None,
        context_parallel_size=degrees.context,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    place = Place(
        data=parallel_state.get_data_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
    )
    world_size, rank = dist.get_world_size(), dist.get_rank()
    gathered: list[tuple[int, int, int, int] | None] = [None] * world_size
    dist.all_gather_object(gathered, dataclasses.astuple(place))
    alone = None
    for other in range(world_size):
        group = parallel_state.create_group([other], group_desc="ALONE")
        alone = group if other == rank else alone
    assert alone is not None
    return Groups(
        degrees=degrees,
        rank=rank,
        place=place,
        places=tuple(Place(*coordinates) for coordinates in gathered if coordinates is not None),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model=parallel_state.get_model_parallel_group(),
        embedding=_embedding_group(place, degrees),
        world=dist.group.WORLD,
        alone=alone,
        megatron=ProcessGroupCollection.use_mpu_process_groups(_NEEDED),
    )


def _embedding_group(place: Place, degrees: Degrees) -> dist.ProcessGroup | None:
    if degrees.pipeline == 1 or place.pipeline not in (0, degrees.pipeline - 1):
        return None
    return parallel_state.get_embedding_group()


def destroy_groups() -> None:
    """Take down all groups that `build_groups` has made, so that another layout can be built in the
    same processes; collective where there are any.

    Megatron-Core only forgets its groups. Each keeps threads and connections (NCCL: GPU memory), so
    that processes which go through many layouts grow slower with each.
    """
    # The list begins with None, which stands for the default group.
    made = [group for group in parallel_state._global_process_group_list or () if group is not None]
    if made:
        # No rank closes a connection on which another still waits for a message.
        dist.barrier()
    for group in dict.fromkeys(made):
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
