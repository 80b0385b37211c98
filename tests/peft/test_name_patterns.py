"""Patterns of strangers: the same matches as `re`, in bounded time."""

from __future__ import annotations

import contextlib
import pathlib
import random
import re
import time
import warnings
from typing import Any

import pytest

from jlora.peft import config
from jlora.peft.methods import PEFT_METHODS
from jlora.peft.name_patterns import LayerPatterns, PatternValues, full_match, share_steps

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


KEYS = [
    *("b", "a.b", "a\\.b", "x.a.b", ".b", "[ab]", "a|b", "...", "a-b", "^b", "^a.b", "^x.a.b"),
    *("b$", "a..b", r"\w", r"a\-b", "b.c", "a.b.c"),
]


def test_pattern_values_agree_with_re() -> None:
    names = ("a.b", "xa.b", "x.a.b", "x.acb", "b", "a.b.c", "a\n.b", "a.b\n", "x\n.a.b", "x.a\nb")
    names += ("x.a-b", "aab", "x.a..b", "a..b")
    rng = random.Random(0)
    for _ in range(300):
        keys = rng.sample(KEYS, rng.randrange(1, 7))
        values = PatternValues(dict.fromkeys(keys, 1))
        matches = {n: [k for k in keys if re.fullmatch(rf"(.*\.)?({k})", n)] for n in names}
        for name in names:
            assert values.first_match(name) == next(iter(matches[name]), None), (keys, name)
        found = {key for name in names for key in matches[name]}
        assert values.first_unmatched(names) == next((k for k in keys if k not in found), None)


def peft_layer(patterns: list[str], name: str) -> int | None:
    """PEFT's own expression for the number of a layer."""
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name)
        if match:
            return int(match[1])
    match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(match[1]) if match and not patterns else None


def test_layer_patterns_agree_with_peft() -> None:
    rng = random.Random(0)
    patterns = [
        "layers",
        "h",
        "a.h",
        "model.layers",
        "layers?",
        "h|layers",
        r"\w",
        "[a-m]",
    ]
    found = set()
    for _ in range(2_000):
        name = ".".join(rng.choices(["layers", "h", "a", "0", "12", "model", "hh"], k=6))
        chosen = rng.sample(patterns, rng.randrange(4))
        expected = peft_layer(chosen, name)
        assert LayerPatterns(chosen).layer_number(name) == expected, (chosen, name)
        found.add(expected)
    assert found == {None, 0, 12}
    with pytest.raises(ValueError, match=r"'l.\*', which finds the layers \[0, 12\]"):
        LayerPatterns(["l.*"]).layer_number("layers.0.a.12.b")


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
    assert time.process_time() - start < 10


COUNT = 20_000
NAMES = [f"m{number}" for number in range(COUNT)]
OPERATORS = [f"(?:[a-z.]+)*m{number}" for number in range(1_500)]
COSTLY: dict[str, dict[str, Any]] = {
    **{
        field: {field: NAMES}
        for field in ("modules_to_save", "exclude_modules", "feedforward_modules")
    },
    "many layers": {"layers_to_transform": list(range(COUNT))},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": NAMES},
    "dots of layers": {"layers_to_transform": [0], "layers_pattern": ["a." + n for n in NAMES]},
    "groups of layers": {"layers_to_transform": [0], "layers_pattern": OPERATORS},
    "nested layers": {"layers_to_transform": [0], "layers_pattern": "(?:(?:[a-z_.0-9]+)+)+!"},
    "rank_pattern": {"rank_pattern": dict.fromkeys(NAMES, 4)},
    "alpha_pattern of groups": {"alpha_pattern": dict.fromkeys(OPERATORS, 4)},
    "too many groups": {"alpha_pattern": {f".*q_proj|m{n}": 4 for n in range(COUNT)}},
    "dots": {"rank_pattern": {f"{n:020b}".replace("1", "."): 4 for n in range(5_000)}},
    "unknown": {f"f{number}": "x" * 1_000 for number in range(COUNT)},
    "tokens": {"trainable_token_indices": [-1] * COUNT},
    **{
        field: {field: "x" * 10**6}
        for field in ("bias", "r", "lora_alpha", "peft_type", "init_lora_weights", "layers_pattern")
    },
    "a long name": {"x" * 10**6: 1},
}  # fmt: skip


@pytest.mark.parametrize("case", COSTLY)
@pytest.mark.thin(2)
def test_costly_config_ends_fast(case: str) -> None:
    modules = [f"model.layers.{number}.attn.{name}_proj" for number in range(32) for name in "qk"]
    raw = {"peft_type": "LORA", "target_modules": ["q_proj"], "fine_tune_type": None}
    start, message = time.process_time(), ""
    try:
        with share_steps():
            fields, method = config.validate_config(pathlib.Path("x.json"), raw | COSTLY[case])
            for module in config.match_target_modules(fields, modules):
                config.fields_for_module(fields, method, module)
                config.is_feedforward(fields, module)
            config.check_rank_patterns(fields, method, modules)
    except ValueError as error:
        message = str(error)
    assert time.process_time() - start < 10  # Some 0.6 s; it was minutes.
    assert len(message) < 2_000
