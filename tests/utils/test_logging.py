"""Which rank says what."""

import io
import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from ghostvis_mega.utils.environment import package_versions
from ghostvis_mega.utils.logging import RankHandler, adopt_deepspeed_logger, setup_logging

OURS = "ghostvis_mega.somewhere"


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Undo what `setup_logging` does to the process."""
    root = logging.getLogger()
    names = (None, "ghostvis_mega", "DeepSpeed", "torch.utils.cpp_extension")
    before = [(name, logging.getLogger(name).level) for name in names]
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    for name, level in before:
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).filters.clear()
    for handler in [h for h in root.handlers if isinstance(h, RankHandler)]:
        root.removeHandler(handler)


def spoken(*, rank: int, verbose: bool = False) -> str:
    """What a process of that rank writes when everybody says something at each level."""
    stream = io.StringIO()
    setup_logging(rank=rank, verbose=verbose, stream=stream)
    for name in (OURS, "megatron.core.x", "DeepSpeed"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "%s-%s", name.split(".")[0], level)
    return stream.getvalue()


def test_rank_0_says_our_info_and_everybodys_warnings() -> None:
    text = spoken(rank=0)
    assert re.search(r"^\d\d:\d\d:\d\d \[0\] ghostvis_mega-20$", text, flags=re.MULTILINE)
    assert "[0] WARNING ghostvis_mega.somewhere: ghostvis_mega-30" in text
    assert "ghostvis_mega-10" not in text
    assert "megatron-20" not in text
    assert "megatron-30" in text
    assert "DeepSpeed-20" not in text
    assert "DeepSpeed-30" in text


def test_other_ranks_keep_our_warnings_and_everybodys_errors() -> None:
    text = spoken(rank=3)
    assert "ghostvis_mega-20" not in text
    assert "[3] WARNING ghostvis_mega.somewhere: ghostvis_mega-30" in text
    assert "megatron-30" not in text
    assert "megatron-40" in text
    assert "DeepSpeed-30" not in text
    assert "DeepSpeed-40" in text


def test_verbose_is_ours_alone() -> None:
    text = spoken(rank=0, verbose=True)
    assert "ghostvis_mega-10" in text
    assert "megatron-10" not in text


def test_a_level_that_deepspeed_sets_later_does_not_make_it_talk() -> None:
    stream = io.StringIO()
    setup_logging(rank=0, stream=stream)
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").info("chatter")
    assert stream.getvalue() == ""


def test_a_second_call_replaces_the_first() -> None:
    first = io.StringIO()
    setup_logging(rank=0, stream=first)
    second = spoken(rank=0)
    assert first.getvalue() == ""
    assert second.count("ghostvis_mega-20") == 1


def test_our_python_warnings_are_logged_and_known_chatter_is_not() -> None:
    stream = io.StringIO()
    warnings.resetwarnings()
    setup_logging(rank=0, stream=stream)
    chatter = "Apex is not installed. Falling back to Torch Norm"
    warnings.warn_explicit(chatter, UserWarning, "x.py", 1, module="megatron.core.models.backends")
    warnings.warn_explicit(chatter, UserWarning, "x.py", 1, module="ghostvis_mega.model")
    assert stream.getvalue().count("Apex is not installed") == 1


def test_versions_name_what_is_installed_only() -> None:
    versions = package_versions()
    assert versions["torch"]
    assert versions["python"].startswith("3.")
    assert all(versions.values())


def test_a_handler_that_deepspeeds_import_brings_is_taken_away() -> None:
    stream, own = io.StringIO(), io.StringIO()
    setup_logging(rank=0, stream=stream)
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(logging.StreamHandler(own))
    logger.propagate = False
    adopt_deepspeed_logger()
    logger.warning("memory pressure")
    assert "memory pressure" in stream.getvalue() and not own.getvalue()
