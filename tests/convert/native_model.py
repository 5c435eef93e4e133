"""An imported checkpoint as our modules in one process, and its scores."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ghostvis_mega.checkpoint.reader import CheckpointReader
from ghostvis_mega.convert.hf_config import model_of_parts
from ghostvis_mega.convert.native import parts_of_layout
from ghostvis_mega.data.batch import ImageSlot, MicroBatch
from ghostvis_mega.model.inputs import model_input
from ghostvis_mega.model.llm import LLMChunk
from ghostvis_mega.model.megatron import BlockLayout, transformer_config
from ghostvis_mega.model.vision import VisionEncoder
from ghostvis_mega.parallel.groups import Groups

CPU = torch.device("cpu")


class NativeModel:
    """Language model and encoder with the weights of a checkpoint, in fp32."""

    def __init__(self, path: Path, groups: Groups):
        with CheckpointReader(path) as reader:
            model = model_of_parts(parts_of_layout(reader.manifest.layout, path))
            assert model is not None
            self.config = model
            config = transformer_config(
                model.llm, layout=BlockLayout(), dtype=torch.float32, backend="cpu"
            )
            self.chunk = LLMChunk(config, model.llm, groups=groups.megatron, backend="cpu").eval()
            self.encoder = None if model.vision is None else VisionEncoder(model).eval()
            named = dict(self.chunk.global_parameters())
            if self.encoder is not None:
                named |= dict(self.encoder.named_parameters())
            assert named.keys() == reader.manifest.parameters.keys()
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(reader.weight(name))

    @torch.no_grad()
    def logits(
        self, tokens: Sequence[int], pixels: torch.Tensor | None = None, *, image: int = -1
    ) -> torch.Tensor:
        """Scores of every position of one row, pictures at full width: [S, V].

        Args:
            tokens: One sentinel a picture.
            pixels: uint8 [n, 3, h, w] of its pictures.
            image: The sentinel.
        """
        width, expanded, starts = self.config.tokens_per_image, [], []
        for token in tokens:
            if token == image:
                starts.append(len(expanded))
            expanded += [token] * (width if token == image else 1)
        row = torch.tensor([expanded])
        batch = MicroBatch(
            tokens_BS=row,
            labels_BS=torch.zeros_like(row),
            weights_BS=torch.zeros(row.shape),
            positions_BS=torch.arange(len(expanded))[None],
            cu_seqlens=None,
            max_seqlen=len(expanded),
            images=tuple(ImageSlot(image_id=i, row=0, start=s) for i, s in enumerate(starts)),
            sample_ids=(0,),
        )
        inputs = model_input(batch, tokens_per_image=width, device=CPU, for_sdpa=True)
        vision_nH = None
        if pixels is not None and self.encoder is not None:
            vision_nH = self.encoder(pixels).flatten(0, 1)
        hidden_SBH = self.chunk(inputs, vision_nH)
        return self.chunk.logits(hidden_SBH, torch.arange(len(expanded)))

    def greedy(
        self,
        tokens: Sequence[int],
        pixels: torch.Tensor | None = None,
        *,
        image: int = -1,
        count: int,
        stop: int = -1,
    ) -> list[int]:
        """The answer, token by token, without the stop token."""
        answer: list[int] = []
        for _ in range(count):
            best = int(self.logits([*tokens, *answer], pixels, image=image)[-1].argmax())
            if best == stop:
                break
            answer.append(best)
        return answer
