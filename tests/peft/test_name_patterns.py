"""Patterns of strangers: the same matches as `re`, in bounded time."""

from __future__ import annotations

import contextlib
import random
import re
import time
import warnings

import pytest

from jlora.peft import config
from jlora.peft.methods import PEFT_METHODS
from jlora.peft.name_patterns import full_match, match_key, share_steps

PIECES = [*"ab._0x", "\n", r"\.", "[ab]", "[^a]", r"\d", r"\W", "[0-9.]", r"[^\d]", r"\s", "(?i:B)"]
ANCHORS = ["^", "$", r"\b", r"\B", r"\A", r"\Z", "(?<=a)", "(?<!b.)"]
REPEATS = ["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}?"]


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    kind = rng.randrange(9) if depth else 0
    if kind < 2:
        return rng.choice(PIECES)
    first, second = (random_pattern(rng, depth - 1) for _ in range(2))
    return [
        rng.choice(ANCHORS),
        first + second,
        f"(?:{first}|{second})",
        f"({first}){rng.choice(REPEATS)}",
        f"(?={first})",
        f"(?!{first})",
        f"(?P<n{rng.randrange(10**9)}>{first}){second}",
    ][kind - 2]


@pytest.mark.parametrize("flags", ["", "(?s)", "(?im)", "(?a)"])
def test_full_match_agrees_with_re(flags: str) -> None:
    rng, compared = random.Random(0), 0
    for _ in range(4_000):
        pattern = flags + random_pattern(rng)
        name = "".join(rng.choice("abAB.0_x\n\u0663\u00df") for _ in range(rng.randrange(1, 7)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = re.fullmatch(pattern, name) is not None
            except re.error:
                continue
        assert full_match(pattern, name) == expected, (pattern, name)
        compared += 1
    assert compared > 3_000


PUBLISHED = (
    r".*\.(q_proj|v_proj)",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|mlp)\.(?:(?:k_proj|q_proj)))",
)


def test_full_match_of_published_patterns() -> None:
    names = [
        f"model.{part}.layers.{number}.self_attn.{name}"
        for part in ("language_model", "visual", "decoder")
        for number in (0, 31)
        for name in ("q_proj", "k_proj", "out_proj", "lora")
    ]
    for pattern in PUBLISHED:
        for name in names:
            assert full_match(pattern, name) == (re.fullmatch(pattern, name) is not None)


HOSTILE = (
    r"(([a-z0-9._]+)+)+!",
    r"(.*)*(.*)*(.*)*(.*)*(.*)*!",
    r"(a|a|b)*(?=(.*)*!)!",
    r"(?:(?:(?:(?:.{0,99}){0,99}){0,99}){0,99}){0,99}!",
    r"(((((a{0,9999}){9999}){9999}){9999}){9999})!",
    "(" * 40 + ".*" + ")*" * 40 + "!",
)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_hostile_pattern_ends(pattern: str) -> None:
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(40)]
    start = time.process_time()
    for fields in (
        {"target_modules": pattern},
        {"target_modules": "all-linear", "exclude_modules": pattern},
        {"target_modules": ["q_proj"], "exclude_modules": pattern},
    ):
        with contextlib.suppress(ValueError):
            config.match_target_modules({**config.COMMON_DEFAULTS, **fields}, modules)
    with pytest.raises(ValueError, match=r"rank_pattern|steps"):
        config.check_rank_patterns(
            {"rank_pattern": {pattern: 4}, "alpha_pattern": {}}, PEFT_METHODS["LORA"], modules
        )
    assert time.process_time() - start < 10


def test_patterns_of_one_config_share_their_steps() -> None:
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(40)]
    letters = "".join(chr(0x4E00 + 2 * number) for number in range(400))
    patterns = {f"(?:.(?<=[^{letters}]))*{number}x": 4 for number in range(200)}
    fields = {"rank_pattern": patterns, "alpha_pattern": {}}

    def match_all() -> None:
        for module in modules:
            config.fields_for_module(fields, PEFT_METHODS["LORA"], module)

    start = time.process_time()
    assert not full_match(next(iter(patterns)), modules[0])  # Alone, it takes few steps.
    with pytest.raises(ValueError, match="too many steps"):
        share_steps()(match_all)()
    assert time.process_time() - start < 10


def test_match_key_agrees_with_re() -> None:
    names = ("a.b", "xa.b", "x.a.b", "x.acb", "b", "a.b.c", "a\n.b", "a.b\n", "x\n.a.b", "x.a\nb")
    for key in ("b", "a.b", "a\\.b", "x.a.b", ".b", "[ab]", "a|b", "...", "a-b"):
        for name in names:
            expected = re.fullmatch(rf"(.*\.)?({key})", name) is not None
            assert match_key(key, name) == expected, (key, name)


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?>a)", "a*+", "(a)?(?(1)b|c)", "(", "a" * 20_000])
def test_unsupported_pattern_raises(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern|regular expression"):
        full_match(pattern, "abc")


def test_long_lists_of_modules_are_matched_fast() -> None:
    modules = [f"model.layers.{number}.mlp.up_proj" for number in range(200)]
    entries = [*(f"module_{number}" for number in range(20_000)), "up_proj"]
    start = time.process_time()
    with pytest.raises(ValueError, match="'module_0', which matches none") as caught:
        config.match_target_modules({**config.COMMON_DEFAULTS, "target_modules": entries}, modules)
    assert len(str(caught.value)) < 1_000
    assert time.process_time() - start < 2
