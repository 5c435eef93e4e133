"""Our tokenizers as `tokenizer.json`, and chat templates as Jinja, for programs that know neither.

Text that looks like a special becomes that special there, as everywhere in that world; ours keeps
it as text. A literal U+2581 comes back as a space from a SentencePiece vocabulary. All other text
has the same ids, and the export compares them on real text before it is written.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from ghostvis_mega.data.styles import Piece, Special, Style
from ghostvis_mega.data.tokenizer import Tokenizer
from ghostvis_mega.data.tokenizer_tiktoken import VOCABULARIES
from ghostvis_mega.utils.errors import CheckpointError

_SPACE = "\u2581"
PROBES = (
    "What is in the picture? A red circle, 12 squares.",
    " two  spaces, a tab\tand\na new line\n\n",
    "def f(x): return {x: 'y'} # 3.14159",
    "Gr\u00fc\u00dfe, \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627, \U0001f642 \u00e9 e\u0301",
    "",
)
"""Texts that are compared beside those of the data."""


def to_tokenizer_json(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary in the `tokenizers` library.

    Raises:
        CheckpointError: Its kind has no such form.
    """
    if tokenizer.kind == "sentencepiece":
        converted = _from_sentencepiece(tokenizer.path)
    elif tokenizer.kind == "tiktoken":
        converted = _from_tiktoken(tokenizer)
    else:
        text = tokenizer.path.read_text(encoding="utf-8")
        converted = tokenizers.Tokenizer.from_str(text)
        converted.no_truncation()
        converted.no_padding()
        # Training writes no tokens but those of the chat template.
        content = json.loads(converted.to_str())
        if (content.get("post_processor") or {}).get("type") != "ByteLevel":
            content["post_processor"] = None
        converted = tokenizers.Tokenizer.from_str(json.dumps(content))
    for name, token in sorted(tokenizer.specials.items(), key=lambda item: item[1]):
        piece = tokenizer.piece(token)
        converted.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
        if converted.token_to_id(piece) != token:
            raise CheckpointError(
                f"the special {name} ({piece}) would have id {converted.token_to_id(piece)} "
                f"instead of {token} in tokenizer.json"
            )
    return converted


def _from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    size = model.vocab_size()
    pieces = [model.id_to_piece(i) for i in range(size)]
    unknown = model.unk_id()
    plain = [
        i
        for i in range(size)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    ]
    scores = {i: model.get_score(i) for i in plain}
    if all(score == int(score) for score in scores.values()):  # BPE: the order of the merges
        ids = {piece: i for i, piece in enumerate(pieces)}
        mergeable = {pieces[i]: i for i in plain}
        merges: list[tuple[str, str]] = []
        for i in sorted(plain, key=lambda i: (-scores[i], i)):
            piece = pieces[i]
            splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            known = [(a, b) for a, b in splits if a in mergeable and b in mergeable]
            merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        core: models.Model = models.BPE(
            vocab=ids,
            merges=merges,
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    else:
        vocab = [(piece, model.get_score(i)) for i, piece in enumerate(pieces)]
        core = models.Unigram(vocab, unk_id=unknown, byte_fallback=True)
    converted = tokenizers.Tokenizer(core)
    converted.normalizer = normalizers.Replace(" ", _SPACE)
    converted.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for i in range(size):
        if model.is_control(i):
            converted.add_special_tokens([AddedToken(pieces[i], special=True, normalized=False)])
    return converted


def _letters() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for 256, 257, ..."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _from_tiktoken(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Ranks are merges: a token was made of the two parts that its bytes merge to last."""
    import base64

    ranks = {}
    for line in tokenizer.path.read_bytes().split(b"\n"):
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    letters = _letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _last_merge(token, ranks)
            merges.append((text(left), text(right)))
    vocab = {text(token): rank for token, rank in ranks.items()}
    published = VOCABULARIES[len(ranks)]
    converted = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(published.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    converted.decoder = decoders.ByteLevel()
    for piece in published.specials:
        converted.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
    return converted


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [
            (ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
        ]
        possible = [(rank, i) for rank, i in pairs if rank is not None and rank < ranks[token]]
        if not possible:
            raise CheckpointError(f"the token {token!r} is no merge of two others")
        _, at = min(possible)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def check_same_ids(ours: Tokenizer, theirs: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Raise if a text has other ids in the converted vocabulary.

    Raises:
        CheckpointError: Shows the text.
    """
    specials = [ours.piece(token) for token in ours.specials.values()]
    for text in texts:
        if _SPACE in text or any(piece in text for piece in specials):
            continue
        one, other = ours.encode(text), theirs.encode(text, add_special_tokens=False).ids
        if one != other:
            raise CheckpointError(
                f"tokenizer {ours.path} cannot be written as tokenizer.json: {text[:80]!r} has "
                f"ids {one[:12]} in training and {other[:12]} there. Give --assets with the "
                "Hugging Face directory that it is from"
            )


def chat_template(style: Style, tokenizer: Tokenizer) -> str:
    """A style as a Jinja template whose messages may hold text or parts."""

    def text(pieces: Sequence[Piece]) -> str:
        return "".join(
            tokenizer.piece(tokenizer.specials[p.name]) if isinstance(p, Special) else p
            for p in pieces
        )

    headers = {role: text(pieces) for role, pieces in style.headers.items()}
    ends = {role: text(pieces) for role, pieces in style.ends.items()}
    image = tokenizer.piece(tokenizer.specials["image"])
    header = "{{- headers[message['role']] -}}"
    if style.joined_user is not None:
        # A user's turn right after the system's goes on without a header of its own.
        header = (
            "{%- if message['role'] == 'user' and not loop.first"
            " and messages[loop.index0 - 1]['role'] == 'system' -%}"
            f"{{{{- {json.dumps(text(style.joined_user))} -}}}}"
            f"{{%- else -%}}{header}{{%- endif -%}}"
        )
    return (
        f"{{%- set headers = {json.dumps(headers)} -%}}\n"
        f"{{%- set ends = {json.dumps(ends)} -%}}\n"
        f"{{{{- {json.dumps(text(style.begin))} -}}}}\n"
        "{%- for message in messages -%}\n"
        f"{header}\n"
        "{%- if message['content'] is string -%}\n"
        "{{- message['content'] -}}\n"
        "{%- else -%}\n"
        "{%- for part in message['content'] -%}\n"
        "{%- if part['type'] in ('image', 'image_url') -%}\n"
        f"{{{{- {json.dumps(image)} -}}}}\n"
        "{%- elif part['type'] == 'text' -%}\n"
        "{{- part['text'] -}}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- endif -%}\n"
        "{{- ends[message['role']] -}}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- headers['assistant'] -}}\n"
        "{%- endif -%}\n"
    )
