"""How chat models write conversations: a table, no code.

In every style the special called `im_end` is what ends an answer, and `im_start` what opens a turn,
whatever their pieces are; generation stops at `im_end`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ghostvis_mega.data.manifest import ALL_TURNS
from ghostvis_mega.data.tokenizer import PIECES


@dataclass(frozen=True)
class Special:
    """A special token by its name in the manifest."""

    name: str


Piece = str | Special


@dataclass(frozen=True)
class Style:
    """What stands around the turns.

    Args:
        pieces: name of a special -> pieces that mean it, best first.
        headers: what precedes the text of each role.
        ends: what follows it; a special in the first place is the turn's end token.
        begin: what opens a conversation or document.
        joined_user: header of a user's turn right after the system's, where they are one.
        trained: roles whose text, and the end token after it, are under the loss.
    """

    pieces: Mapping[str, tuple[str, ...]]
    headers: Mapping[str, tuple[Piece, ...]]
    ends: Mapping[str, tuple[Piece, ...]]
    begin: tuple[Piece, ...] = ()
    joined_user: tuple[Piece, ...] | None = None
    trained: frozenset[str] = frozenset({"assistant"})

    def has_end_token(self, role: str) -> bool:
        """Turns of `role` end with a token of their own."""
        return bool(self.ends[role]) and isinstance(self.ends[role][0], Special)


_BOS, _START, _END = Special("bos"), Special("im_start"), Special("im_end")
_ROLES = ("system", "user", "assistant", "tool")


def _chatml() -> Style:
    return Style(
        pieces=PIECES,
        headers={role: (_START, f"{role}\n") for role in _ROLES},
        ends=dict.fromkeys(_ROLES, (_END, "\n")),
    )


def _llama3() -> Style:
    names = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
    close = Special("header_end")
    return Style(
        pieces={
            **PIECES,
            "bos": ("<|begin_of_text|>",),
            "endoftext": ("<|end_of_text|>",),
            "im_start": ("<|start_header_id|>",),
            "header_end": ("<|end_header_id|>",),
            "im_end": ("<|eot_id|>",),
        },
        headers={role: (_START, name, close, "\n\n") for role, name in names.items()},
        ends=dict.fromkeys(_ROLES, (_END,)),
        begin=(_BOS,),
    )


def _vicuna() -> Style:
    """Also LLaVA 1.5; the roles are plain words, only the end of an answer is a token."""
    return Style(
        pieces={
            **PIECES,
            "bos": ("<s>",),
            "endoftext": ("</s>",),
            "im_start": ("<s>",),
            "im_end": ("</s>",),
        },
        headers={
            "system": (),
            "user": ("USER: ",),
            "assistant": ("ASSISTANT: ",),
            "tool": ("TOOL: ",),
        },  # fmt: skip
        ends={"system": (" ",), "user": (" ",), "assistant": (_END,), "tool": (" ",)},
        begin=(_BOS,),
    )


def _gemma() -> Style:
    """The system's words open the first turn of the user."""
    names = {"system": "user", "user": "user", "assistant": "model", "tool": "user"}
    return Style(
        pieces={
            **PIECES,
            "bos": ("<bos>",),
            "endoftext": ("<eos>",),
            "im_start": ("<start_of_turn>",),
            "im_end": ("<end_of_turn>",),
        },
        headers={role: (_START, f"{name}\n") for role, name in names.items()},
        ends={**dict.fromkeys(_ROLES, (_END, "\n")), "system": ("\n\n",)},
        begin=(_BOS,),
        joined_user=(),
    )


def _plain() -> Style:
    """Text after text, for captions: an answer ends with the end-of-text token."""
    pieces = {**PIECES, "im_start": PIECES["endoftext"], "im_end": PIECES["endoftext"]}
    return Style(
        pieces=pieces,
        headers=dict.fromkeys(_ROLES, ()),
        ends={**dict.fromkeys(_ROLES, ("\n",)), "assistant": (_END,)},
    )


_ANSWERS: Mapping[str, Style] = {
    "chatml": _chatml(),
    "llama3": _llama3(),
    "vicuna": _vicuna(),
    "gemma": _gemma(),
    "plain": _plain(),
}
STYLES: Mapping[str, Style] = _ANSWERS | {
    name + ALL_TURNS: replace(style, trained=frozenset(_ROLES)) for name, style in _ANSWERS.items()
}
