"""The LLM, or the chunk of it that one pipeline stage holds, over Megatron-Core's TransformerBlock.

Shape legend: S sequence, B batch, H hidden, R rows of the loss, V vocabulary (this rank's part when
cut).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from ghostvis_mega.config.schema import LLMConfig
from ghostvis_mega.model.dropout import ATTENTION, EMBEDDING, drop
from ghostvis_mega.model.embedding import NOWHERE, embed
from ghostvis_mega.model.init import initialize
from ghostvis_mega.model.inputs import ModelInput
from ghostvis_mega.model.loss import LossTargets, head_loss
from ghostvis_mega.model.loss_chunks import CHUNK_BYTES
from ghostvis_mega.model.megatron import Backend, block_spec
from ghostvis_mega.model.shards import canonical_name


class Vocabulary(VocabParallelEmbedding):
    """The embedding matrix, which is also the head's where weights are tied; each rank holds some
    rows.

    All uses go through `forward`, so that ZeRO-3's hooks gather the weight for each.
    """

    def forward(
        self,
        x: torch.Tensor,
        *,
        as_head: bool = False,
        targets: LossTargets | None = None,
        overwritten: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed token ids [B, S] -> [B, S, H], or as the head score rows [R, H] -> [R, V], or give
        their loss without the scores [R, H] -> [].

        `overwritten` are flat S*B positions whose embeddings nobody will read.
        """
        if targets is not None:
            return head_loss(x, self.weight, targets, group=self.tp_group)
        if as_head:
            return F.linear(x, self.weight)
        if not (torch.is_grad_enabled() and hasattr(self.weight, "main_grad")):
            return super().forward(x)
        own = x - self.vocab_start_index
        own = own.masked_fill((own < 0) | (own >= self.weight.shape[0]), NOWHERE)
        learn = own
        if overwritten is not None:
            flat = own.t().flatten().index_fill(0, overwritten, NOWHERE)
            learn = flat.view(own.shape[1], own.shape[0]).t()
        found = embed(self.weight, own, learn.contiguous())
        return mappings.reduce_from_tensor_model_parallel_region(found, group=self.tp_group)


class LLMChunk(MegatronModule):
    """Embedding, some layers and the head: whatever of them this pipeline stage and chunk holds.

    Args:
        config: Megatron-Core's configuration, which carries the layout.
        llm: Our settings.
        groups: Process groups that Megatron-Core's layers communicate in.
        backend: Layer implementation.
        first: Whether this chunk embeds tokens.
        last: Whether this chunk computes the loss.
        chunk: Its number on this stage (interleaved schedule), else None.
        fused_loss: Whether `loss_sum` goes without the scores of all its rows at once.
        fused_rope: Whether queries and keys are split off and rotated in one operation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        llm: LLMConfig,
        *,
        groups: ProcessGroupCollection,
        backend: Backend,
        first: bool = True,
        last: bool = True,
        chunk: int | None = None,
        fused_loss: bool = False,
        fused_rope: bool = False,
    ):
        super().__init__(config=config)
        self.llm, self.backend = llm, backend
        self.fused_loss, self.fused_rope = fused_loss, fused_rope
        self.loss_chunk_bytes = CHUNK_BYTES
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = first, last, chunk
        self.tp_group = groups.tp
        num_layers = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=groups.pp.rank())
        spec = block_spec(config, num_layers=num_layers, backend=backend, fused_rope=fused_rope)
        self.decoder = TransformerBlock(
            config,
            spec,
            pre_process=first,
            post_process=last,
            pg_collection=groups,
            vp_stage=chunk,
        )
        if first:
            self.embedding = self._vocabulary(groups)
        if last and not (first and llm.tied_embeddings):
            self.head = self._vocabulary(groups)
        half = torch.arange(0, llm.head_dim, 2, dtype=torch.float32)
        self.register_buffer(
            "inverse_frequencies", 1.0 / llm.rope_base ** (half / llm.head_dim), persistent=False
        )

    def _vocabulary(self, groups: ProcessGroupCollection) -> Vocabulary:
        return Vocabulary(
            self.llm.vocab_size,
            self.llm.hidden_size,
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=False,
            config=self.config,
            tp_group=groups.tp,
        )

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their global names; a tied head of a later stage is another copy of the
        embedding."""
        for name, parameter in self.named_parameters():
            name = self.global_name(canonical_name(name))
            if name == "head.weight" and self.llm.tied_embeddings:
                name = "embedding.weight"
            yield name, parameter

    def global_name(self, name: str) -> str:
        """Name of a parameter or module of this chunk, with the layer's number in the whole
        model."""
        if not name.startswith("decoder.layers."):
            return name
        _, _, index, *rest = name.split(".", 3)
        number = self.decoder.layers[int(index)].layer_number - 1
        return ".".join(["decoder.layers", str(number), *rest])

    def initialize(self, seed: int) -> None:
        """Fill the parameters with values that depend on (seed, global name) alone."""
        initialize(
            list(self.global_parameters()),
            seed=seed,
            std=self.llm.init_std,
            tensor_size=self.tp_group.size(),
            tensor_rank=self.tp_group.rank(),
            gated=self.config.gated_linear_unit,
            vocab_tokens=self.llm.vocab_tokens,
        )

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        """Take over the activations of the stage before; called by Megatron-Core's schedules."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(self, inputs: ModelInput, vision_nH: torch.Tensor | None) -> torch.Tensor:
        """Run the chunk.

        Args:
            inputs: The micro-batch.
            vision_nH: [len(inputs.image_rows), H] image embeddings in slot order; None on later
                stages.

        Returns:
            Hidden states [S, B, H] (S cut between tensor ranks with sequence parallelism), from the
            last chunk normalised and ready for `loss_sum` or `logits`.
        """
        keys_SB = self._dropout_keys(inputs)
        hidden_SBH = self._embed(inputs, vision_nH) if self.pre_process else None
        if hidden_SBH is not None and keys_SB is not None:
            rate = self.llm.hidden_dropout
            hidden_SBH = drop(hidden_SBH, keys_SB, layer=EMBEDDING, site=ATTENTION, rate=rate)
        return self.decoder(
            hidden_states=hidden_SBH,
            attention_mask=None,
            context_mask=keys_SB,
            rotary_pos_emb=self._rotary(inputs),
            packed_seq_params=inputs.packed,
        )

    def _dropout_keys(self, inputs: ModelInput) -> torch.Tensor | None:
        """Keys of the positions whose activations this rank holds: int64 [S, B]; None where
        nothing is dropped."""
        keys_SB = inputs.dropout_keys_SB
        if not self.training or self.llm.hidden_dropout == 0.0:
            return None
        if keys_SB is None:
            raise ValueError("training with hidden_dropout needs inputs with dropout keys")
        if self.config.sequence_parallel:
            keys_SB = keys_SB.chunk(self.tp_group.size())[self.tp_group.rank()]
        return keys_SB

    def _embed(self, inputs: ModelInput, vision_nH: torch.Tensor | None) -> torch.Tensor:
        text_BSH = self.embedding(inputs.tokens_BS, overwritten=inputs.image_rows)
        text_SBH = text_BSH.transpose(0, 1).contiguous()
        several = self.config.context_parallel_size > 1
        if several and inputs.shows_images and not text_SBH.requires_grad:
            # A frozen LLM, and the pictures may all lie in another context-parallel rank's slice:
            # this rank must still pass on what its queries make of their keys and values.
            text_SBH.requires_grad_(torch.is_grad_enabled())
        hidden_SBH = splice(text_SBH, inputs.image_rows, vision_nH)
        if self.config.sequence_parallel:
            hidden_SBH = mappings.scatter_to_sequence_parallel_region(
                hidden_SBH, group=self.tp_group
            )
        return hidden_SBH

    def _rotary(self, inputs: ModelInput) -> torch.Tensor:
        """Rotation angles: [rows, 1, 1, D].

        There is one row for each of this rank's rows of the sequence, but for packed input on
        Megatron-Core's own path: then one for each row of the whole sequence, and Megatron-Core
        cuts the table for the context-parallel rank. Transformer Engine's kernel for that path
        restarts positions at each segment by itself and wants the plain table; the CPU layers take
        each token's own position.
        """
        if inputs.packed is None:
            positions = inputs.rows_S
        elif self.fused_rope:
            positions = inputs.positions_BW[0, inputs.rows_S]
        elif self.backend == "cpu":
            positions = inputs.positions_BW[0]
        else:
            positions = torch.arange(inputs.positions_BW.shape[1], device=inputs.rows_S.device)
        angles = torch.outer(positions.float(), self.inverse_frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    @property
    def output(self) -> Vocabulary:
        """What scores hidden states: the head, or the embedding where this chunk ties the two."""
        return self.head if hasattr(self, "head") else self.embedding

    def logits(self, hidden_SBH: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Scores of this rank's part of the vocabulary at flat S*B positions: [R, V].

        Those of padding are -inf: it takes no probability and gets no gradient.
        """
        scores_RV = self.output(self._picked(hidden_SBH, rows), as_head=True)
        if self.llm.vocab_padding:
            first = self.tp_group.rank() * scores_RV.shape[1]
            rows_V = torch.arange(first, first + scores_RV.shape[1], device=scores_RV.device)
            scores_RV = scores_RV.masked_fill(rows_V >= self.llm.vocab_tokens, float("-inf"))
        return scores_RV

    def _picked(self, hidden_SBH: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Hidden states at flat S*B positions, on all tensor ranks alike: [R, H].

        Each has part of the vocabulary; the backward sums over them.
        """
        if self.config.sequence_parallel:
            hidden_SBH = mappings.gather_from_sequence_parallel_region(
                hidden_SBH, group=self.tp_group
            )
            return hidden_SBH.flatten(0, 1)[rows]
        picked_RH = hidden_SBH.flatten(0, 1)[rows]
        return mappings.copy_to_tensor_model_parallel_region(picked_RH, group=self.tp_group)

    def loss_sum(
        self,
        hidden_SBH: torch.Tensor,
        inputs: ModelInput,
        *,
        expected_grad: float | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the cross-entropy over the trained positions, fp32 scalar.

        Only trained positions go through the head: prompts and images cost no logits. The fused
        loss saves a copy of the head's gradient where it knows the gradient that it will get.
        """
        if self.fused_loss:
            targets = LossTargets(
                inputs.labels_R,
                inputs.weights_R,
                tokens=self.llm.vocab_tokens,
                chunk_bytes=self.loss_chunk_bytes,
                expected_grad=expected_grad,
            )
            return self.output(self._picked(hidden_SBH, inputs.trained_rows), targets=targets)
        logits_RV = self.logits(hidden_SBH, inputs.trained_rows).float()
        loss_R = vocab_parallel_cross_entropy(logits_RV, inputs.labels_R, tp_group=self.tp_group)
        return (loss_R * inputs.weights_R).sum()


def splice(
    text_SBH: torch.Tensor, image_rows: torch.Tensor, vision_nH: torch.Tensor | None
) -> torch.Tensor:
    """Put image embeddings in the places that image tokens keep for them.

    Args:
        text_SBH: Token embeddings.
        image_rows: int64 [n], flat S*B positions.
        vision_nH: The embeddings, one row for each position; None when there are no images.

    Raises:
        ValueError: Positions and embeddings differ in number: text and pictures are out of step.
    """
    given = 0 if vision_nH is None else vision_nH.shape[0]
    if given != image_rows.shape[0]:
        raise ValueError(
            f"the text has {image_rows.shape[0]} image positions but {given} image embeddings came"
        )
    if vision_nH is None or given == 0:
        return text_SBH
    flat = text_SBH.flatten(0, 1).index_copy(0, image_rows, vision_nH.to(text_SBH.dtype))
    return flat.view_as(text_SBH)
