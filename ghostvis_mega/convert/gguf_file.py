"""llama.cpp's GGUF files as weights under Hugging Face's names, put back into floating point."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ghostvis_mega.convert.block_reader import Piece
from ghostvis_mega.convert.gguf_check import check_header
from ghostvis_mega.convert.source import Source
from ghostvis_mega.convert.tensor_file import CHUNK_BYTES, TensorInfo
from ghostvis_mega.utils.errors import CheckpointError, MissingDependencyError

SUFFIX = ".gguf"
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_KINDS = ("llama", "qwen2")
_PAIRED = ("attn_q.weight", "attn_k.weight")
"""Their rows lie in another order in llama-type files: llama.cpp rotates neighbouring rows, Hugging
Face a row of the first half of a head with one of the second."""


class GGUFFile(Source):
    """An open GGUF file of a Llama or Qwen2 model.

    Quantised tensors come as fp32: what llama.cpp computes with, give or take its own rounding of
    inputs.

    Raises:
        CheckpointError: It is damaged, or no such model.
        MissingDependencyError: The package `gguf` is not installed.
    """

    def __init__(self, path: Path):
        self.path, self.others = path, set()
        try:
            import gguf
        except ImportError as error:
            raise MissingDependencyError("gguf", needed_for=str(path), extra="gguf") from error
        self._gguf = gguf
        try:
            check_header(path)
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
            raise CheckpointError(f"{path} is no sound GGUF file: {error}") from error
        self._fields = reader.fields
        self.kind = self._field("general.architecture", "")
        if self.kind not in _KINDS:
            raise CheckpointError(
                f"{path} holds a model of type {self.kind!r}; read are {', '.join(_KINDS)}"
            )
        self._tensors: dict[str, Any] = {}
        self._readable: set[Any] = set()
        self.tensors: dict[str, TensorInfo] = {}
        for tensor in reader.tensors:
            name = self._hf_name(tensor.name)
            if name in self.tensors:
                raise CheckpointError(f"{path} names {tensor.name} twice")
            self._tensors[name] = tensor
            self._check_type(tensor)
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self.tensors[name] = TensorInfo("F32", shape)

    def _check_type(self, tensor: Any) -> None:
        """Raise where the library cannot put a tensor's type back into floating point."""
        kind = tensor.tensor_type
        if kind in self._readable:
            return
        try:
            self._gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {tensor.name} is of type {kind.name}, which cannot be put back into "
                "floating point; take a file of another type, as Q8_0 or F16"
            ) from error
        self._readable.add(kind)

    def _count(self, name: str, default: int | None = None) -> int:
        """A setting that is a number of something."""
        value = self._field(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self.path} gives {name} as {value!r}; it must be one whole number above 0"
            )
        return value

    def _field(self, name: str, default: Any = None) -> Any:
        """A setting of the file; without a default it must be there."""
        field = self._fields.get(name)
        if field is None:
            if default is None:
                raise CheckpointError(f"{self.path} lacks {name}")
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {name} is no text in UTF-8: {error}") from error
        # Written as fp32: the decimal number that was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    @staticmethod
    def _hf_name(name: str) -> str:
        if name in _TOP:
            return _TOP[name]
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
            return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
        # Left to the check of names, which tells what has no place.
        return name

    @property
    def settings_file(self) -> str:
        """The file itself."""
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """What Hugging Face's config.json of this model would say."""
        kind = self.kind
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} lacks token_embd.weight")
        heads = self._count(f"{kind}.attention.head_count")
        hidden = self._count(f"{kind}.embedding_length")
        head_dim = self._count(f"{kind}.attention.key_length", hidden // heads)
        turned = self._count(f"{kind}.rope.dimension_count", head_dim)
        scaling = self._field(f"{kind}.rope.scaling.type", "none")
        if turned != head_dim:
            raise CheckpointError(
                f"{self.path}: {turned} of {head_dim} values of a head are rotated; only all can be"
            )
        return {
            "model_type": kind,
            "hidden_act": "silu",
            "num_hidden_layers": self._count(f"{kind}.block_count"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": self._count(f"{kind}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._count(f"{kind}.feed_forward_length"),
            "vocab_size": embedding.shape[0],
            "max_position_embeddings": self._count(f"{kind}.context_length"),
            "rms_norm_eps": self._field(f"{kind}.attention.layer_norm_rms_epsilon"),
            "rope_parameters": {
                "rope_type": "default" if scaling == "none" else scaling,
                "rope_theta": self._field(f"{kind}.rope.freq_base", 10_000.0),
            },
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
        }

    def pieces(self, name: str, start: int, length: int) -> Iterator[Piece]:
        """Elements as fp32, some rows at a time."""
        tensor, shape = self._tensors[name], self.tensors[name].shape
        width = shape[1] if len(shape) > 1 else 1
        assert start % width == 0 and length % width == 0, f"{name} is read by whole rows"
        order = self._row_order(tensor.name, shape[0])
        step = max(1, CHUNK_BYTES // (4 * width))
        for row in range(start // width, (start + length) // width, step):
            rows = order[row : min(row + step, (start + length) // width)]
            values = self._gguf.dequantize(tensor.data[rows], tensor.tensor_type)
            yield memoryview(np.ascontiguousarray(values, dtype="<f4")).cast("B")

    def _row_order(self, name: str, rows: int) -> np.ndarray:
        """Where the file has each row."""
        if self.kind != "llama" or not name.endswith(_PAIRED):
            return np.arange(rows)
        heads = self._count("llama.attention.head_count")
        if "attn_k" in name:
            heads = self._count("llama.attention.head_count_kv", heads)
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def close(self) -> None:
        """Let go of the file."""
        self._tensors.clear()

    def tokenizer_json(self) -> bytes:
        """The vocabulary as the content of a `tokenizer.json`.

        Raises:
            CheckpointError: It is of a kind that is not read.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        model, cut = self._field("tokenizer.ggml.model", ""), self._field("tokenizer.ggml.pre", "")
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        steps = {
            "gpt-2": words,
            "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words]),
        }
        if model != "gpt2" or cut not in steps:
            raise CheckpointError(
                f"{self.path} has a vocabulary of kind {model!r} cut as {cut!r}; read is 'gpt2', "
                f"cut as {' or '.join(steps)}. Take the tokenizer.json of the original model"
            )
        pieces = self._field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self._field("tokenizer.ggml.merges")]
        if len(set(pieces)) != len(pieces) or any(len(pair) != 2 for pair in merges):
            raise CheckpointError(f"{self.path}: its vocabulary names a piece twice, or its merges "
                                  "are no pairs")  # fmt: skip
        vocab = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = steps[cut]
        tokenizer.decoder = decoders.ByteLevel()
        control = self._gguf.TokenType.CONTROL
        kinds = self._field("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens(
            [
                AddedToken(piece, special=True, normalized=False)
                for piece, kind in zip(pieces, kinds, strict=True)
                if kind == control
            ]
        )
        return tokenizer.to_str(pretty=True).encode()
