"""SentencePiece tokenizer whose special tokens no text can produce.

Specials are CONTROL symbols: the encoder never emits them for text, so a user who writes
"<|im_end|>" gets plain characters. Only the chat template inserts their ids.
"""

import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from ghostvis_mega.data.manifest import TokenizerInfo
from ghostvis_mega.utils.errors import DataError
from ghostvis_mega.utils.files import atomic_write, sha256_file

log = logging.getLogger(__name__)

SPECIALS = {
    "pad": "<|pad|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "image": "<|image|>",
    "endoftext": "<|endoftext|>",
}
"""Name in the manifest -> piece."""

SMALLEST_VOCAB = 256 + len(SPECIALS) + 2
"""256 bytes, the specials, <unk>, and at least one piece."""

_SPACE_MARK = "\u2581"
_LONGEST_LINE_BYTES = 1 << 14


class Tokenizer:
    """A loaded SentencePiece model."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, *, path: Path, sha256: str):
        self._processor = processor
        self.path = path
        self.sha256 = sha256
        self.vocab_size: int = processor.vocab_size()
        self.specials = _special_ids(processor, path)
        self._space_mark = [
            processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()
        ]
        if not all(processor.is_byte(token) for token in self._space_mark):
            raise DataError(
                f"tokenizer file {path} has no byte fallback, so some text would be unknown; "
                "train one with `python -m tools.preprocess train-tokenizer`"
            )

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a model file; DataError if it is missing, damaged or lacks a special token."""
        if not path.is_file():
            raise DataError(
                f"tokenizer file {path} does not exist; "
                "make one with `python -m tools.preprocess train-tokenizer`"
            )
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"tokenizer file {path} is not a SentencePiece model ({error})"
            ) from error
        return cls(processor, path=path, sha256=sha256_file(path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never a special token, never unknown (bytes are the fallback).

        Raises:
            DataError: `text` has lone surrogates and so no UTF-8 form.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text is not valid Unicode: {error.reason} at character {error.start}"
            ) from error
        # SentencePiece writes spaces as U+2581, so that character itself would come back as a
        # space; as bytes it survives.
        first, *rest = (self._processor.encode(part) for part in text.split(_SPACE_MARK))
        return [*first, *(token for part in rest for token in (*self._space_mark, *part))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens leave nothing behind."""
        return self._processor.decode([int(token) for token in ids])

    def piece(self, token: int) -> str:
        """The vocabulary entry of one id, for display."""
        return self._processor.id_to_piece(int(token))

    def info(self, *, file: str) -> TokenizerInfo:
        """What the manifest says about this tokenizer."""
        return TokenizerInfo(
            kind="sentencepiece",
            file=file,
            sha256=self.sha256,
            vocab_size=self.vocab_size,
            specials=self.specials,
        )


def _special_ids(processor: sentencepiece.SentencePieceProcessor, path: Path) -> dict[str, int]:
    ids = {}
    for name, piece in SPECIALS.items():
        token = processor.piece_to_id(piece)
        if processor.id_to_piece(token) != piece or not processor.is_control(token):
            raise DataError(
                f"tokenizer file {path} has no control symbol {piece}; "
                "train one with `python -m tools.preprocess train-tokenizer`"
            )
        ids[name] = token
    return ids


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
