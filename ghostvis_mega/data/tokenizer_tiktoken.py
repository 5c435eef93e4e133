"""Byte-pair ranks in tiktoken's text format: a base64 token and its rank on each line.

The file holds neither the pattern that cuts text into words nor the special tokens; both belong to
a published vocabulary, which is recognised by its number of ranks.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ghostvis_mega.data.manifest import TokenizerInfo
from ghostvis_mega.data.tokenizer import PIECES, Kind, Tokenizer
from ghostvis_mega.utils.errors import DataError, MissingDependencyError

_QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a ranks file leaves out; the specials follow the ranks without a gap."""

    name: str
    pattern: str
    specials: tuple[str, ...] = ()


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

VOCABULARIES = {
    151_643: Vocabulary(
        "qwen", rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_SIGNS}|{_TAIL}", _QWEN_SPECIALS
    ),
    248_044: Vocabulary(
        "qwen3_6",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
        rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}",
        _QWEN_SPECIALS,
    ),
    128_000: Vocabulary("llama3", rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_TAIL}"),
}
"""Number of ranks -> vocabulary."""


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"tokenizer file {path}, line {number}: expected a base64 token and its rank"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"tokenizer file {path}: its ranks are not 0 to {len(ranks) - 1}")
    return ranks


class TiktokenTokenizer(Tokenizer):
    """Ranks of a published vocabulary; needs the tiktoken package."""

    kind: ClassVar[Kind] = "tiktoken"
    file_name = "tokenizer.tiktoken"

    def __init__(
        self,
        path: Path,
        *,
        pieces: Mapping[str, Sequence[str]] = PIECES,
        info: TokenizerInfo | None = None,
    ):
        try:
            import tiktoken
        except ImportError as error:
            raise MissingDependencyError(
                "tiktoken", needed_for="A .tiktoken tokenizer", extra="data"
            ) from error
        ranks = _read_ranks(path)
        vocabulary = VOCABULARIES.get(len(ranks))
        if vocabulary is None:
            known = ", ".join(f"{count} ({found.name})" for count, found in VOCABULARIES.items())
            raise DataError(
                f"tokenizer file {path} has {len(ranks)} ranks, of no vocabulary whose word "
                f"pattern is known: {known}; convert it to tokenizer.json"
            )
        self._encoding = tiktoken.Encoding(
            vocabulary.name,
            pat_str=vocabulary.pattern,
            mergeable_ranks=ranks,
            special_tokens={},
        )
        self._published = {
            piece: len(ranks) + place for place, piece in enumerate(vocabulary.specials)
        }
        super().__init__(
            path=path,
            base_size=len(ranks) + len(self._published),
            control=self._published.values(),
            pieces=pieces,
            info=info,
        )

    def _find(self, piece: str) -> int | None:
        return self._published.get(piece)

    def _encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def _piece(self, token: int) -> str:
        for piece, published in self._published.items():
            if published == token:
                return piece
        return self._encoding.decode_single_token_bytes(token).decode("utf-8", "replace")
