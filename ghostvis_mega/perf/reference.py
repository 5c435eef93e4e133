"""The truth that layouts are compared with: one process, one row at a time, fp32, plain autograd,
torch's AdamW.

No Transformer Engine, no schedule, no exchange, no ZeRO and no packing of work over ranks; only the
model's own mathematics.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.data.batch import MicroBatch
from ghostvis_mega.engine.build import build_chunks, build_encoder
from ghostvis_mega.engine.finish import fill_missing_gradients
from ghostvis_mega.engine.optimizer import lr_factor, parameter_groups
from ghostvis_mega.model.dropout import Draw
from ghostvis_mega.model.inputs import model_input
from ghostvis_mega.parallel.groups import Groups


class PlainTrainer:
    """Trains the whole model in this process.

    Args:
        run: Settings; the parallel degrees in them are not read.
        groups: Groups whose tensor and pipeline degrees are 1; nothing is communicated.
        device: Of this process.
    """

    def __init__(self, run: RunConfig, groups: Groups, *, device: torch.device):
        assert groups.degrees.tensor == groups.degrees.pipeline == 1, "the reference is never cut"
        self.run, self.device = run, device
        dtype = torch.float32
        # Not Transformer Engine's layers, on a GPU either, nor the fused parts: what is compared
        # with them must not share their code.
        (self.llm,) = build_chunks(
            run,
            groups,
            device=device,
            dtype=dtype,
            backend="cpu",
            fused_loss=False,
            fused_rope=False,
        )
        self.encoder = build_encoder(run, device=device, dtype=dtype)
        frozen = {"llm": self.llm}
        if self.encoder is not None:
            frozen |= {
                "vision": self.encoder.tower,
                "resampler": self.encoder.resampler,
                "projector": self.encoder.projector,
            }
        for module in run.train.freeze:
            frozen[module].requires_grad_(False)
        self.trained = [(name, p) for name, p in self.parameters().items() if p.requires_grad]
        if run.train.precision == "bf16":
            # A BF16 run starts from weights rounded to BF16; the truth computes in fp32 from the
            # same ones.
            with torch.no_grad():
                for parameter in self.parameters().values():
                    parameter.copy_(parameter.bfloat16())
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.trained, run.optim), betas=run.optim.betas, eps=run.optim.eps
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters under their global names."""
        named = dict(self.llm.global_parameters())
        return named | (dict(self.encoder.named_parameters()) if self.encoder is not None else {})

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by global name after `backward`; zeros where the batch had nothing to learn
        from."""
        return {
            name: p.grad.clone() if p.grad is not None else torch.zeros_like(p, dtype=torch.float32)
            for name, p in self.trained
        }

    def backward(
        self,
        rows: Sequence[MicroBatch],
        pictures: Mapping[int, torch.Tensor],
        *,
        step: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> float:
        """Accumulate the gradient of the mean loss over all rows' trained tokens; returns that
        loss.

        Args:
            rows: The whole global batch.
            pictures: uint8 [3, h, w] by image id.
            step: Decides what dropout drops.
            progress: Called before each row.
        """
        trained_tokens = sum(float(row.weights_BS.sum()) for row in rows)
        total = 0.0
        for row in rows:
            progress()
            loss = self._loss_sum(row, pictures, step=step) / trained_tokens
            if loss.requires_grad:
                loss.backward()
            total += loss.item()
        return total

    def _loss_sum(
        self, row: MicroBatch, pictures: Mapping[int, torch.Tensor], *, step: int
    ) -> torch.Tensor:
        inputs = model_input(
            row,
            tokens_per_image=self.run.model.tokens_per_image,
            device=self.device,
            for_sdpa=self.llm.backend == "cpu",
            dropout=Draw.of(self.run, step=step),
        )
        vision_nH = None
        if row.images:
            assert self.encoder is not None, "a text-only model got pictures"
            pixels = torch.stack([pictures[slot.image_id] for slot in row.images]).to(self.device)
            vision_nH = self.encoder(pixels).flatten(0, 1)
        return self.llm.loss_sum(self.llm(inputs, vision_nH), inputs)

    def update(self, *, step: int) -> float:
        """Clip and step with the schedule's learning rates; returns the norm before the clip."""
        # What the batch did not use has a gradient of zero; without one AdamW would neither decay
        # it nor its moments.
        fill_missing_gradients(p for _, p in self.trained)
        limit = self.run.optim.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_([p for _, p in self.trained], limit).item()
        factor = lr_factor(step, optim=self.run.optim, total_steps=self.run.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * getattr(self.run.optim.lr, group["module"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm
