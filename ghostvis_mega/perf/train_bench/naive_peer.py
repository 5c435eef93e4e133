"""The naive baseline: what a plain PyTorch script does before anyone has optimised it."""

import contextlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.train_bench.peer import PeerStep, PeerTrainer
from ghostvis_mega.perf.train_bench.plain_vlm import PlainVLM, plain_input


class NaiveTrainer(PeerTrainer):
    """One sample a row, rows padded to the longest of their micro-batch; eager attention in tower
    and LLM, every layer operator by operator, logits of all positions in fp32; the tower runs once
    for each sample's picture; fp32 weights (under BF16 autocast where the run is BF16), PyTorch's
    default AdamW and DistributedDataParallel.

    Args:
        run: Settings.
        groups: Of this rank.
        device: Of this rank.
    """

    def __init__(self, run: RunConfig, groups: Groups, *, device: torch.device):
        super().__init__(run, groups, device=device)
        self.bf16 = run.train.precision == "bf16"
        plain = PlainVLM(
            run, dtype=torch.float32, device=device, attention="eager", one_by_one=True
        ).train()
        self.optimizer = torch.optim.AdamW(
            plain.adamw_groups(run), betas=run.optim.betas, eps=run.optim.eps
        )
        self.model: nn.Module = plain
        self.trained = [p for p in plain.parameters() if p.requires_grad]
        if len(groups.places) > 1:
            self.model = DistributedDataParallel(
                plain, find_unused_parameters=plain.encoder is not None
            )
        precision = "BF16 autocast over fp32 weights" if self.bf16 else "fp32"
        self.description = {
            "model": "transformers Qwen2ForCausalLM, eager attention, one sample a row",
            "layout": f"{len(groups.places)} x DistributedDataParallel, rows of "
            f"{run.batch.micro_size}",
            "optimizer": "torch.optim.AdamW as it comes",
            "precision": precision,
        }

    def train(self, work: PeerStep) -> torch.Tensor:
        """All micro-batches; gradients are averaged in the last one's backward."""
        total = torch.zeros((), device=self.device)
        last = len(work.micro_batches) - 1
        for number, (batch, used) in enumerate(zip(work.micro_batches, work.used, strict=True)):
            inputs = plain_input(
                batch,
                work.pictures,
                used=used,
                tokens_per_image=self.run.model.tokens_per_image,
                device=self.device,
            )
            waits = number < last and isinstance(self.model, DistributedDataParallel)
            context = self.model.no_sync() if waits else contextlib.nullcontext()
            with self.timer.section("forward and backward"), context:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss = self.model(inputs, loss_divisor=1 / work.loss_scale)
                loss.backward()
            total += loss.detach()
        with self.timer.section("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(work.step, group["module"])
            limit = self.run.optim.clip_norm or float("inf")
            nn.utils.clip_grad_norm_(self.trained, limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return total
