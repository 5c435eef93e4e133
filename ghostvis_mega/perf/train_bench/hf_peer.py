"""The transformers peer: its model under DeepSpeed ZeRO, as Hugging Face's trainer would run it."""

import json
import logging
import time

import deepspeed
import torch

from ghostvis_mega.config.deepspeed import resolve_deepspeed
from ghostvis_mega.config.schema import RunConfig
from ghostvis_mega.engine.optimizer import build_adamw
from ghostvis_mega.parallel.groups import Groups
from ghostvis_mega.perf.train_bench.peer import PeerStep, PeerTrainer
from ghostvis_mega.perf.train_bench.plain_vlm import PlainVLM, plain_input

log = logging.getLogger(__name__)

_NEVER = 10**9


class HFTrainer(PeerTrainer):
    """Qwen2ForCausalLM with SDPA attention, PyTorch's fused AdamW, and DeepSpeed's own gradient
    accumulation, reduction and clip.

    Of `deepspeed.llm` the ZeRO stage counts; all else of ZeRO is DeepSpeed's default but for
    overlapped communication.

    Args:
        run: Settings; `train.recompute=full` checkpoints every layer.
        groups: Of this rank.
        device: Of this rank.
        liger: Use Liger's kernels, its fused linear + cross-entropy among them.
    """

    def __init__(self, run: RunConfig, groups: Groups, *, device: torch.device, liger: bool):
        super().__init__(run, groups, device=device)
        began = time.perf_counter()
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_qwen2

            apply_liger_kernel_to_qwen2()
            began = self._tell("Liger imported", began)
        bf16 = run.train.precision == "bf16"
        model = PlainVLM(
            run,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            device=device,
            attention="sdpa",
        )
        if run.train.recompute == "full":
            model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        began = self._tell("model built", began)
        stage = zero_stage(run, world_size=len(groups.places))
        optimizer = build_adamw(model.adamw_groups(run), run.optim, device=device)
        micro_batches = run.batch.global_size // run.batch.micro_size // groups.degrees.data
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": run.batch.micro_size,
                "gradient_accumulation_steps": micro_batches,
                "gradient_clipping": run.optim.clip_norm,
                "bf16": {"enabled": bf16},
                "zero_optimization": {
                    "stage": stage,
                    "overlap_comm": stage > 0 and device.type == "cuda",
                },
                "steps_per_print": _NEVER,
            },
        )
        self._tell("DeepSpeed started", began)
        self.description = {
            "model": "transformers Qwen2ForCausalLM, SDPA" + (", Liger" if liger else ""),
            "layout": f"{len(groups.places)} x ZeRO-{stage}, {micro_batches} micro-batches of "
            f"{run.batch.micro_size}",
            "optimizer": type(optimizer).__name__,
            "recompute": run.train.recompute,
        }

    def _tell(self, what: str, began: float) -> float:
        """Log how long a part of the start took; returns when the next one begins."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        log.info("%s in %.1f s", what, now - began)
        return now

    def train(self, work: PeerStep) -> torch.Tensor:
        """All micro-batches; DeepSpeed divides each loss by their number."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate(work.step, group["module"])
        count = len(work.micro_batches)
        total = torch.zeros((), device=self.device)
        for batch, used in zip(work.micro_batches, work.used, strict=True):
            inputs = plain_input(
                batch,
                work.pictures,
                used=used,
                tokens_per_image=self.run.model.tokens_per_image,
                device=self.device,
            )
            with self.timer.section("forward and backward"):
                loss = self.engine(inputs, loss_divisor=1 / (work.loss_scale * count))
                self.engine.backward(loss)
            with self.timer.section("optimizer"):
                self.engine.step()
            total += loss.detach() / count
        return total


def zero_stage(run: RunConfig, *, world_size: int) -> int:
    """The ZeRO stage that the run's DeepSpeed file asks for."""
    if "llm" in run.train.freeze:
        file = json.loads(run.deepspeed.llm.read_text(encoding="utf-8"))
        return int(file.get("zero_optimization", {}).get("stage", 0))
    return resolve_deepspeed(run.deepspeed.llm, run=run, engine="llm", world_size=world_size).stage
