"""Answers: those of stock transformers, one prefill for n of them, seeds, ends, kept pictures."""

import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ghostvis_mega.convert.importer import ImportOptions, import_hf
from ghostvis_mega.generate.decoder import Decoder
from ghostvis_mega.generate.engine import Completion, Engine
from ghostvis_mega.generate.memory import OutOfMemory
from ghostvis_mega.generate.pictures import EmbeddingCache
from ghostvis_mega.generate.sampling import Modes, RowOptions, Sampling, SamplingError, choose
from ghostvis_mega.parallel.groups import Groups
from tests.convert.cases import IMAGE, TEXTS, VLMS
from tests.convert.native_model import NativeModel
from tests.generate.models import CPU, PICTURES, PROMPTS, Made, engine_of, pixels, request

LENGTH = 8


def answers(engine: Engine, *, prompts: list[int], **sampling) -> list[list[Completion]]:
    return engine.generate([request(PROMPTS[i], **sampling) for i in prompts])


def stock_tokens(path, name: str, prompt: int, *, width: int) -> list[int]:
    """Greedy tokens of transformers' own loop."""
    own = name.split("-")[0] in ("perceiver", "avgpool")
    kind = AutoModelForCausalLM if name in TEXTS else AutoModelForImageTextToText
    model = kind.from_pretrained(path, trust_remote_code=own).eval()
    tokens, ids = PROMPTS[prompt]
    inputs = {
        "input_ids": torch.tensor([[t for x in tokens for t in [x] * (width if x == IMAGE else 1)]])
    }
    if ids:
        mean, std = {
            "siglip": ([0.5] * 3, [0.5] * 3),
            "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        }[name.split("-")[1]]
        shape = (3, 1, 1)
        normalised = pixels(ids).float() / 255 - torch.tensor(mean).view(shape)
        inputs["pixel_values"] = normalised / torch.tensor(std).view(shape)
    settings = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None}
    return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", VLMS + TEXTS)
def test_greedy_tokens_are_those_of_transformers(made: Made, name: str):
    native, export = made[name]
    prompts = [0] if name in TEXTS else [0, 1, 2]
    engine = engine_of(native)
    # More prompts than rows: they take turns.
    engine.max_rows = 2
    found = answers(engine, prompts=prompts, max_tokens=LENGTH)
    width = engine.model.tokens_per_image
    for prompt, own in zip(prompts, found, strict=True):
        assert list(own[0].tokens) == stock_tokens(export, name, prompt, width=width)
        assert own[0].finish_reason == "length"


def test_logprobs_are_those_of_the_training_model(made: Made, groups: Groups):
    native, _ = made["perceiver-siglip"]
    engine, model = engine_of(native), NativeModel(native, groups)
    settings = {"max_tokens": 6, "temperature": 1.3, "top_k": 40, "repetition_penalty": 1.2}
    for prompt, own in enumerate(answers(engine, prompts=[0, 1, 2], **settings)):
        tokens, ids = PROMPTS[prompt]
        made_tokens = list(own[0].tokens)
        scores = model.logits([*tokens, *made_tokens], pixels(ids), image=IMAGE)
        wanted = scores.log_softmax(dim=-1)[-len(made_tokens) - 1 : -1]
        wanted = wanted.gather(1, torch.tensor(made_tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(own[0].logprobs), wanted, rtol=0, atol=1e-5)


def test_n_answers_share_one_prefill(made: Made, monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(made["llava-siglip"][0])
    prefilled = []
    whole = Decoder.prefill

    def counted(self, hidden_BSH, cache, rows):
        prefilled.append(len(hidden_BSH))
        return whole(self, hidden_BSH, cache, rows)

    monkeypatch.setattr(Decoder, "prefill", counted)
    settings = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
    several = answers(engine, prompts=[2], n=4, **settings)[0]
    assert prefilled == [1]
    assert len({own.tokens for own in several}) == 4
    # The first of n is the only one of 1.
    assert answers(engine, prompts=[2], **settings)[0][0].tokens == several[0].tokens
    greedy = answers(engine, prompts=[2], n=3, max_tokens=6)[0]
    assert len({own.tokens for own in greedy}) == 1


def test_more_answers_than_rows_come_in_waves(made: Made):
    engine, small = (engine_of(made["llava-siglip"][0], max_rows=rows) for rows in (8, 3))
    settings = {"max_tokens": 4, "temperature": 1.0, "seed": 3, "n": 7}
    wanted = answers(engine, prompts=[2, 0], **settings)
    found = answers(small, prompts=[2, 0], **settings)
    assert small._rows.count == 3 and [len(own) for own in found] == [7, 7]
    assert [[c.tokens for c in own] for own in found] == [[c.tokens for c in own] for own in wanted]
    assert len({c.tokens for c in found[0]}) == 7


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 10**15}, {"top_k": 10**30}, {"top_p": 1e-50}, {"temperature": 1e-6}],
    ids=str,
)
def test_extreme_numbers_still_draw_sound_tokens(made: Made, options):
    engine = engine_of(made["qwen2"][0])
    sane = {"top_p": 1e-3} if "top_p" in options or "temperature" in options else {}
    base = {"temperature": 1.0, "seed": 2, "max_tokens": 1000}
    wanted = answers(engine, prompts=[0], **base | sane)[0][0]
    found = answers(engine, prompts=[0], **base | options)[0][0]
    assert found.tokens == wanted.tokens and math.isfinite(sum(found.logprobs))


def test_memory_that_runs_out_is_told(made: Made):
    engine = engine_of(made["qwen2"][0], max_rows=1 << 36)
    with pytest.raises(OutOfMemory, match="fewer --rows"):
        answers(engine, prompts=[0], n=1 << 36)


@pytest.mark.parametrize("window", [1, 3])
def test_a_seed_gives_the_same_tokens_in_any_company(made: Made, window: int):
    engine = engine_of(made["llava-siglip"][0], window=window)
    settings = {"max_tokens": 7, "temperature": 1.2, "seed": 11}
    alone = answers(engine, prompts=[1], **settings)[0][0].tokens
    assert len(alone) == 7
    company = [
        request(PROMPTS[0], max_tokens=3),
        request(PROMPTS[2], max_tokens=9, temperature=0.7, top_p=0.9, seed=5),
        request(PROMPTS[1], **settings),
        request(PROMPTS[0], max_tokens=5, repetition_penalty=1.5),
    ]
    engine.max_rows = 3
    found = engine.generate(company)
    assert [len(own[0].tokens) for own in found] == [3, 9, 7, 5]
    assert found[2][0].tokens == alone
    other = answers(engine, prompts=[1], **{**settings, "seed": 12})[0][0].tokens
    assert other != alone


class Letters:
    """Tokens as letters; token 2 ends."""

    stop_tokens = frozenset([2])

    def decode(self, tokens) -> str:
        return "".join(chr(0x100 + token) for token in tokens if token not in self.stop_tokens)


def test_end_tokens_and_texts_end_answers(made: Made):
    engine = engine_of(made["qwen2"][0], codec=Letters(), window=3)
    whole = answers(engine, prompts=[0], max_tokens=12)[0][0]
    assert whole.text == Letters().decode(whole.tokens) and whole.finish_reason == "length"
    stop = whole.text[4:6]
    cut = answers(engine, prompts=[0], max_tokens=12, stop=("none", stop))[0][0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.find(stop)]
    assert stop not in cut.text and whole.text.startswith(cut.text)
    engine.codec = Letters()
    engine.codec.stop_tokens = frozenset([whole.tokens[3]])
    ended = answers(engine, prompts=[0], max_tokens=12)[0][0]
    end = whole.tokens.index(whole.tokens[3])
    assert ended.tokens == whole.tokens[: end + 1] and ended.finish_reason == "stop"
    assert len(ended.text) == end
    on = answers(engine, prompts=[0], max_tokens=12, ignore_end=True)[0][0]
    assert on.tokens == whole.tokens


def test_streamed_text_grows_to_the_answer(made: Made):
    engine = engine_of(made["qwen2"][0], codec=Letters())
    seen: list[str] = []
    found = engine.generate(
        [request(PROMPTS[0], max_tokens=5)], on_text=lambda _r, _s, text, _f: seen.append(text)
    )
    assert seen[-1] == found[0][0].text and len(seen) == 5
    assert all(long.startswith(short) for short, long in zip(seen, seen[1:], strict=False))


def test_a_picture_is_encoded_once(made: Made):
    engine = engine_of(made["llava-siglip"][0])
    first = answers(engine, prompts=[1, 2], max_tokens=2)
    statistics = engine.pictures.cache.statistics
    # One of the four is shown twice.
    assert (statistics.misses, statistics.hits, statistics.held) == (3, 1, 3)
    each = engine.model.tokens_per_image * engine.model.llm.hidden_size * 4
    assert statistics.held_bytes == 3 * each
    again = answers(engine, prompts=[1, 2], max_tokens=2)
    assert (statistics.misses, statistics.hits) == (3, 5) and statistics.hit_rate == 5 / 8
    assert [own[0].tokens for own in first] == [own[0].tokens for own in again]
    # Room for two: the one longest unused goes.
    small = engine_of(made["llava-siglip"][0])
    small.pictures.cache = EmbeddingCache(2 * each)
    small.pictures([PICTURES[0], PICTURES[1]])
    small.pictures([PICTURES[0]])
    small.pictures([PICTURES[2]])
    assert small.pictures.cache.statistics.evicted == 1
    small.pictures([PICTURES[0]])
    assert small.pictures.cache.statistics.hits == 2
    small.pictures([PICTURES[1]])
    assert small.pictures.cache.statistics.misses == 4


def test_kept_pictures_are_told_apart_by_what_they_become(made: Made, tmp_path: Path):
    siglip = made["llava-siglip"][0]
    wide = import_hf([made["llava-siglip"][1]], tmp_path / "wide", ImportOptions(image_size=24))
    engines = [
        engine_of(siglip),
        engine_of(wide),
        engine_of(siglip, dtype=torch.bfloat16),
        engine_of(made["llava-clip"][0]),
    ]
    keys = {engine.pictures.key(PICTURES[0]) for engine in engines}
    keys.add(engines[0].pictures.key(PICTURES[1]))
    assert len(keys) == 5
    assert engine_of(siglip).pictures.key(PICTURES[0]) in keys


@pytest.mark.parametrize("name", ["llava-siglip", "qwen2-tied"])
def test_rows_of_padding_are_never_chosen(made: Made, tmp_path: Path, name: str):
    """Their scores are 0: at a high temperature most draws would take one."""
    plain = engine_of(made[name][1])
    padded = import_hf([made[name][1]], tmp_path / "padded", ImportOptions(vocab_multiple=512))
    engine = engine_of(padded)
    assert engine.model.llm.vocab_size == 512 and plain.model.llm.vocab_size == 157
    asked = [{"temperature": 3.0, "seed": 5, "n": 3, "max_tokens": 12}, {"max_tokens": 12}]
    for settings in asked:
        (wanted,), (found,) = (answers(e, prompts=[0], **settings) for e in (plain, engine))
        assert [own.tokens for own in found] == [own.tokens for own in wanted]
        # Nor have they a share of the probability.
        for own, other in zip(found, wanted, strict=True):
            assert own.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    with pytest.raises(SamplingError, match="token 157, the model has 157"):
        engine.generate([request(([157], ()))])


def wanted_probabilities(scores: torch.Tensor, sampling: Sampling, seen: list[int]) -> torch.Tensor:
    """What transformers' own processors make of one row."""
    row, ids = scores[None].clone(), torch.tensor([seen])
    if sampling.repetition_penalty != 1:
        row = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, row)
    row = TemperatureLogitsWarper(sampling.temperature)(ids, row)
    if sampling.top_k:
        row = TopKLogitsWarper(sampling.top_k)(ids, row)
    if sampling.top_p < 1:
        row = TopPLogitsWarper(sampling.top_p)(ids, row)
    if sampling.min_p > 0:
        row = MinPLogitsWarper(sampling.min_p)(ids, row)
    return row.softmax(dim=-1)[0]


OPTIONS = (
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.5, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.2, top_k=12, top_p=0.7, min_p=0.05, repetition_penalty=1.4),
)


def test_a_prompt_may_hold_tokens_that_cannot_be_chosen(made: Made):
    engine = engine_of(made["llava-siglip"][0], choices=50)
    penalised = {"max_tokens": 6, "repetition_penalty": 1.7}
    (first,), (second,) = answers(engine, prompts=[0, 1], **penalised)
    assert max(PROMPTS[0][0]) >= 50 > max(first.tokens + second.tokens)
    # Those that can be are penalised as ever.
    seen = engine._rows.options.seen_RV
    assert {int(t) for t in seen[0].nonzero()} == {7, 30, 41, 9} | set(first.tokens)


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_draws_follow_transformers_probabilities(sampling: Sampling):
    """Each token gets exactly its share of the numbers that can be drawn."""
    draws, vocab = 4000, 24
    scores = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(4))
    seen = [0, 3, 3, 7]
    options = RowOptions(1, length=draws, vocab=vocab, device=CPU)
    options.set(0, Sampling(**{**vars(sampling), "max_tokens": 1}), sample=0, prompt=seen)
    options.draws_RM[0] = torch.arange(draws) / draws
    many = options.rows([0] * draws)
    tokens, _ = choose(scores.expand(draws, vocab), torch.arange(draws), many, Modes.of([sampling]))
    found = torch.bincount(tokens, minlength=vocab) / draws
    wanted = wanted_probabilities(scores, sampling, seen)
    assert (found - wanted).abs().max() < 2 / draws
    assert not found[wanted == 0].any()


def test_draws_are_spread_evenly_and_differ():
    sampling = Sampling(seed=1)
    one, other = sampling.draws(0, 20_000), sampling.draws(1, 20_000)
    assert torch.equal(sampling.draws(0, 7), one[:7])
    assert abs(float(one.mean()) - 0.5) < 0.01 and one.min() >= 0 and one.max() < 1
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.03


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("temperature", 1e-40),
        ("temperature", 1e300),
        ("temperature", math.nan),
        ("temperature", True),
        ("temperature", "1"),
        ("max_tokens", 1.5),
        ("top_k", 2.5),
        ("top_p", None),
        ("seed", 1.5),
        ("n", True),
        ("n", 0),
        ("stop", ("",)),
        ("stop", "qx"),
        ("stop", ("a", 1)),
        ("stop", 5),
        ("ignore_end", 1),
    ],
)
def test_options_that_cannot_be_are_named(field: str, value):
    with pytest.raises(SamplingError, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("tokens", "pictures", "sentence"),
    [
        ((), 0, "empty"),
        ((7, 200), 0, "token 200"),
        ((7, IMAGE, IMAGE), 1, "2 places for images and 1 came"),
        ((7,) * 128, 0, "128 positions"),
        ((IMAGE,) * 8, 8, "128 positions"),
    ],
)
def test_prompts_that_cannot_be_are_named(made: Made, tokens, pictures: int, sentence: str):
    engine = engine_of(made["llava-siglip"][0])
    asked = request((list(tokens), tuple(range(pictures)) if pictures < 4 else (0,) * pictures))
    with pytest.raises(SamplingError, match=sentence):
        engine.generate([asked])


def test_an_answer_ends_where_positions_end(made: Made):
    engine = engine_of(made["qwen2"][0], window=3)
    own = answers(engine, prompts=[0], max_tokens=1000)[0][0]
    assert len(own.tokens) == engine.model.llm.max_positions - len(PROMPTS[0][0])
    assert own.finish_reason == "length"
