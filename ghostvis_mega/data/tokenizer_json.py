"""Tokenizers of the Hugging Face `tokenizers` library: one `tokenizer.json` file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import tokenizers

from ghostvis_mega.data.manifest import TokenizerInfo
from ghostvis_mega.data.tokenizer import PIECES, Kind, Tokenizer
from ghostvis_mega.utils.errors import DataError


def _missing_bytes(loaded: tokenizers.Tokenizer) -> frozenset[int]:
    """Bytes that a byte-level vocabulary lacks; the library would drop them without a word."""
    if not isinstance(loaded.decoder, tokenizers.decoders.ByteLevel):
        return frozenset()
    # GPT-2's table: printable bytes stand for themselves, the others for 256, 257, ...
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return frozenset(b for b, letter in letters.items() if loaded.token_to_id(letter) is None)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`; its post-processor, truncation and padding are not used."""

    kind: ClassVar[Kind] = "tokenizer.json"
    file_name = "tokenizer.json"

    def __init__(
        self,
        path: Path,
        *,
        pieces: Mapping[str, Sequence[str]] = PIECES,
        info: TokenizerInfo | None = None,
    ):
        try:
            text = path.read_text(encoding="utf-8")
            loaded = tokenizers.Tokenizer.from_str(text)
        # The library raises bare Exception, whatever is wrong with the file.
        except Exception as error:  # noqa: BLE001
            raise DataError(f"tokenizer file {path} is no tokenizer.json ({error})") from error
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = True  # "special" added tokens in text are plain text
        self._tokenizer = loaded
        self._missing = _missing_bytes(loaded)
        added = loaded.get_added_tokens_decoder()
        control = [token for token, piece in added.items() if piece.special]
        size = 1 + max(loaded.get_vocab(with_added_tokens=True).values(), default=-1)
        super().__init__(path=path, base_size=size, control=control, pieces=pieces, info=info)

    def _find(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def _encode(self, text: str) -> list[int]:
        if self._missing and not self._missing.isdisjoint(found := text.encode()):
            lost = ", ".join(f"0x{byte:02X}" for byte in sorted(self._missing.intersection(found)))
            raise DataError(f"tokenizer {self.path} has no token for {lost}, so text would be lost")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""
