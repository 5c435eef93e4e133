"""Degrees of parallelism as arithmetic: no process group, no torch.

Rank order is Megatron's `tp-cp-dp-pp`: tensor-parallel ranks are neighbours, pipeline stages are
furthest apart.
"""

import math
from dataclasses import dataclass

from ghostvis_mega.config.rules_pipeline import stage_layers
from ghostvis_mega.config.schema import RunConfig


@dataclass(frozen=True)
class Degrees:
    """How a world of processes is divided; `config.rules` refuses what does not divide."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int

    @classmethod
    def of(cls, run: RunConfig, *, world_size: int) -> "Degrees":
        """Degrees of a run.

        Raises:
            ValueError: The degrees do not divide the world.
        """
        p = run.parallel
        replica = p.tensor * p.pipeline * p.context
        if world_size < 1 or world_size % replica:
            raise ValueError(
                f"{world_size} processes cannot hold replicas of {replica} "
                f"(tensor {p.tensor} x pipeline {p.pipeline} x context {p.context})."
            )
        return cls(
            world_size=world_size,
            tensor=p.tensor,
            pipeline=p.pipeline,
            virtual_pipeline=p.virtual_pipeline,
            context=p.context,
            data=world_size // replica,
        )

    @property
    def model_parallel(self) -> int:
        """Processes of one replica, tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context

    @property
    def num_chunks(self) -> int:
        """Model chunks of the whole pipeline."""
        return self.pipeline * self.virtual_pipeline

    @property
    def sequence_multiple(self) -> int:
        """What the length of a sequence must be a multiple of: context parallelism cuts it into two
        chunks a rank, sequence parallelism cuts a rank's part over the tensor-parallel ranks."""
        if self.context == 1:
            return self.tensor
        return self.context * math.lcm(2, self.tensor)

    def num_micro_batches(self, run: RunConfig) -> int:
        """Micro-batches that every replica runs in one step."""
        return run.batch.global_size // (self.data * run.batch.micro_size)

    def layers_per_stage(self, run: RunConfig) -> tuple[int, ...]:
        """LLM layers of each pipeline stage; its chunks have equally many.

        Raises:
            ValueError: The layers cannot be dealt out so; `config.rules` says why.
        """
        sizes = stage_layers(run.parallel, run.model.llm.num_layers)
        if sizes is None:
            raise ValueError(
                f"{run.model.llm.num_layers} layers cannot be dealt out over {self.pipeline} "
                "pipeline stages as parallel says."
            )
        return sizes

    def layers_of_stage(self, run: RunConfig, stage: int) -> tuple[range, ...]:
        """Global layer numbers (from 0) of a pipeline stage, one range for each of its chunks.

        Chunk v of stage p is chunk `v * pipeline + p` of the whole, as Megatron lays them out.
        """
        sizes = [size // self.virtual_pipeline for size in self.layers_per_stage(run)]
        before, size = sum(sizes[:stage]), sizes[stage]
        first = [v * sum(sizes) + before for v in range(self.virtual_pipeline)]
        return tuple(range(start, start + size) for start in first)

    def bubble_share(self, run: RunConfig) -> float:
        """Idle time over useful time of the pipeline schedule, all stages taken as equally long."""
        work = self.num_micro_batches(run) * self.virtual_pipeline
        return (self.pipeline - 1) / work if work else 0.0

    def describe(self) -> str:
        """One line for logs, such as `8 processes = TP 2 x PP 2 x DP 2`."""
        parts = [f"TP {self.tensor}", f"PP {self.pipeline}"]
        if self.virtual_pipeline > 1:
            parts[-1] += f" ({self.virtual_pipeline} chunks each)"
        if self.context > 1:
            parts.append(f"CP {self.context}")
        parts.append(f"DP {self.data}")
        noun = "process" if self.world_size == 1 else "processes"
        return f"{self.world_size} {noun} = {' x '.join(parts)}"
