"""What DeepSpeed asks about the layout: one answer for the LLM, another for the replicated vision
encoder."""

import torch.distributed as dist

from ghostvis_mega.parallel.groups import Groups


class LLMGrid:
    """The LLM's grid: gradients are averaged over data parallelism, norms and weights are cut over
    the model group."""

    def __init__(self, groups: Groups):
        self.groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.groups.model)

    def get_model_parallel_world_size(self) -> int:
        return self.groups.model.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self.groups.place.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.groups.degrees.tensor

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.groups.place.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.groups.degrees.pipeline

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.groups.data)

    def get_data_parallel_world_size(self) -> int:
        return self.groups.data.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.groups.data)


class WorldGrid:
    """The vision encoder's grid: whole on every rank, so its data-parallel group is the world."""

    def __init__(self, groups: Groups):
        self.groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.alone

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.world

    def get_data_parallel_rank(self) -> int:
        return self.groups.rank

    def get_data_parallel_world_size(self) -> int:
        return self.groups.world.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(self.groups.world.size()))
