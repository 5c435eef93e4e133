"""Tokenizers behind one interface; no text can produce their special tokens.

Three kinds of files: SentencePiece models, Hugging Face `tokenizer.json` and tiktoken ranks. A
special that the file lacks is appended behind its vocabulary. Text that looks like a special is
encoded as plain characters; only the chat template inserts special ids.
"""

import io
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import sentencepiece

from ghostvis_mega.data.manifest import TokenizerInfo
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import atomic_write, sha256_file

log = logging.getLogger(__name__)

Kind = Literal["sentencepiece", "tokenizer.json", "tiktoken"]

SPECIALS = {
    "pad": "<|pad|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "image": "<|image|>",
    "endoftext": "<|endoftext|>",
}
"""Name in the manifest -> piece of the tokenizers that we train."""

PIECES: Mapping[str, tuple[str, ...]] = {
    "endoftext": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"),
    "im_start": ("<|im_start|>",),
    "im_end": ("<|im_end|>",),
    "image": ("<|image|>", "<image>", "<|image_pad|>", "<image_soft_token>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
}
"""Name -> pieces that mean it, best first; the first is appended where a file has none."""

SMALLEST_VOCAB = 256 + len(SPECIALS) + 2
"""256 bytes, the specials, <unk>, and at least one piece."""

_SPACE_MARK = "\u2581"
_LONGEST_LINE_BYTES = 1 << 14
# A ModelProto may be continued: normalizer_spec { add_dummy_prefix: false
# remove_extra_whitespaces: false }. Pieces of a conversation are encoded one by one, so a space
# before each would come back as text that nobody wrote.
_KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class Tokenizer(ABC):
    """A loaded vocabulary; `specials` maps names to ids, `vocab_size` is one more than any id."""

    kind: ClassVar[Kind]
    file_name: ClassVar[str]
    """Name of its copy inside a dataset."""

    def __init__(
        self,
        *,
        path: Path,
        base_size: int,
        control: Iterable[int],
        pieces: Mapping[str, Sequence[str]],
        info: TokenizerInfo | None,
    ):
        """Find or append the specials.

        Args:
            base_size: ids of the file itself.
            control: ids in the file that text must not produce.
            pieces: name -> pieces that mean it.
            info: a dataset's record of this tokenizer; its ids are taken as they are.
        """
        self.path = path
        self.sha256 = sha256_file(path)
        self._base_size = base_size
        self._appended: dict[int, str] = {}
        if info is None:
            self.specials = {name: self._special(found) for name, found in pieces.items()}
            self.vocab_size = base_size + len(self._appended)
        else:
            self.specials = dict(info.specials)
            self.vocab_size = info.vocab_size
            self._appended = {
                token: pieces[name][0] if name in pieces else name
                for name, token in info.specials.items()
                if token >= base_size
            }
        self._reserved = frozenset([*control, *self.specials.values()])

    def _special(self, candidates: Sequence[str]) -> int:
        for piece in candidates:
            if (token := self._find(piece)) is not None:
                return token
        for token, piece in self._appended.items():
            if piece == candidates[0]:
                return token
        token = self._base_size + len(self._appended)
        self._appended[token] = candidates[0]
        return token

    @staticmethod
    def load(
        path: Path,
        *,
        pieces: Mapping[str, Sequence[str]] = PIECES,
        info: TokenizerInfo | None = None,
    ) -> "Tokenizer":
        """Load a file; its name ends in .json (Hugging Face) or .tiktoken, else SentencePiece.

        Args:
            pieces: the specials that a chat template wants; see `template.load_tokenizer`.
            info: what the manifest says, for the copy inside a dataset; decides the kind.

        Raises:
            DataError: the file is missing or damaged.
        """
        if not path.is_file():
            raise DataError(
                f"tokenizer file {path} does not exist; "
                "make one with `python -m tools.preprocess train-tokenizer`"
            )
        kinds: dict[str, Kind] = {".json": "tokenizer.json", ".tiktoken": "tiktoken"}
        kind = info.kind if info is not None else kinds.get(path.suffix, "sentencepiece")
        if kind == "tokenizer.json":
            from ghostvis_mega.data.tokenizer_json import JsonTokenizer

            return JsonTokenizer(path, pieces=pieces, info=info)
        if kind == "tiktoken":
            from ghostvis_mega.data.tokenizer_tiktoken import TiktokenTokenizer

            return TiktokenTokenizer(path, pieces=pieces, info=info)
        return SentencePieceTokenizer(path, pieces=pieces, info=info)

    # --- what a kind provides

    @abstractmethod
    def _find(self, piece: str) -> int | None:
        """Id of a piece of the file."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of valid text, perhaps with reserved ones."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that are neither reserved nor appended."""

    @abstractmethod
    def _piece(self, token: int) -> str:
        """Vocabulary entry of an id of the file."""

    # --- what all share

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never a special token.

        Raises:
            DataError: `text` has lone surrogates and so no UTF-8 form.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text is not valid Unicode: {error.reason} at character {error.start}"
            ) from error
        ids = self._encode(text)
        return ids if self._reserved.isdisjoint(ids) else self._encode_apart(text)

    def _encode_apart(self, text: str) -> list[int]:
        """Cut each look-alike of a special after its first character, so that none is whole."""
        pieces = sorted(filter(None, (self.piece(token) for token in self._reserved)))
        look_alike = re.compile("(?=" + "|".join(re.escape(piece) for piece in pieces) + ")")
        cuts = [0, *(match.start() + 1 for match in look_alike.finditer(text)), len(text)]
        parts = (text[start:end] for start, end in zip(cuts, cuts[1:], strict=False))
        ids = [token for part in parts for token in self._encode(part)]
        if not self._reserved.isdisjoint(ids):
            raise DataError(f"tokenizer {self.path} turns the plain text {text[:80]!r} into one of "
                            "its special tokens: use another tokenizer")  # fmt: skip
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens leave nothing behind."""
        plain = [int(token) for token in ids]
        return self._decode(
            [i for i in plain if i not in self._reserved and i not in self._appended]
        )

    def has_special(self, ids: Iterable[int]) -> bool:
        """Some of `ids` are specials, which text cannot produce."""
        return not (self._reserved | self._appended.keys()).isdisjoint(int(i) for i in ids)

    def piece(self, token: int) -> str:
        """The vocabulary entry of one id, for display."""
        return self._appended.get(int(token)) or self._piece(int(token))

    def info(self, *, file: str) -> TokenizerInfo:
        """What the manifest says about this tokenizer."""
        return TokenizerInfo(
            kind=self.kind,
            file=file,
            sha256=self.sha256,
            vocab_size=self.vocab_size,
            specials=self.specials,
        )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback; spaces stay as they are written."""

    kind: ClassVar[Kind] = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(
        self,
        path: Path,
        *,
        pieces: Mapping[str, Sequence[str]] = PIECES,
        info: TokenizerInfo | None = None,
    ):
        try:
            processor = sentencepiece.SentencePieceProcessor(
                model_proto=path.read_bytes() + _KEEP_SPACES
            )
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"tokenizer file {path} is not a SentencePiece model ({error})"
            ) from error
        self._processor = processor
        size = processor.vocab_size()
        control = [i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)]
        super().__init__(path=path, base_size=size, control=control, pieces=pieces, info=info)
        self._space_mark = [
            processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()
        ]
        if not all(processor.is_byte(token) for token in self._space_mark):
            raise DataError(
                f"tokenizer file {path} has no byte fallback, so some text would be unknown; "
                "train one with `python -m tools.preprocess train-tokenizer`"
            )

    def _find(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None

    def _encode(self, text: str) -> list[int]:
        # SentencePiece writes spaces as U+2581, so that character itself would come back as a
        # space; as bytes it survives.
        first, *rest = (self._processor.encode(part) for part in text.split(_SPACE_MARK))
        return [*first, *(token for part in rest for token in (*self._space_mark, *part))]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)


def train_tokenizer(lines: Iterable[str], *, vocab_size: int, path: Path) -> Tokenizer:
    """Train a BPE model on `lines`, write it to `path`, and load it.

    Deterministic: one thread, no sampling of the input. A small corpus may not hold `vocab_size`
    pieces; the result is then smaller, and `Tokenizer.vocab_size` is the real size.

    Raises:
        DataError: `vocab_size` is too small for bytes and specials, or there is no text.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"vocabulary size {vocab_size} is too small: "
            f"256 bytes and {len(SPECIALS)} special tokens need at least {SMALLEST_VOCAB}"
        )
    model = io.BytesIO()
    # Identity normalisation, no dummy prefix and no trimming make decode(encode(x)) == x, so that
    # what is trained is exactly what the data says.
    lines = list(lines)
    if not any(line.strip() for line in lines):
        raise DataError("the tokenizer could not be trained: the source holds no text")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for line in lines for part in line.splitlines() if part),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=list(SPECIALS.values()),
            max_sentence_length=_LONGEST_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"the tokenizer could not be trained with vocabulary size {vocab_size}: {error}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, model.getvalue())
    tokenizer = Tokenizer.load(path)
    log.info("trained %s: %d tokens (%d asked for)", path, tokenizer.vocab_size, vocab_size)
    return tokenizer
