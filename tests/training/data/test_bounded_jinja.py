"""Templates that would run for ever or fill the memory end in an error."""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
import time
import tomllib
import tracemalloc

import jinja2
import jinja2.sandbox
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from jlora.training.data import bounded_jinja
from jlora.training.data.chat_template import ChatTemplate

CHAT = [{"role": "user", "content": "hi"}]
LONG = "{% set s = 'a' * 150000 %}"
NESTED = (
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
)
DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x"

HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": (
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(40) }}"
    ),
    "recursive loop": "{% for i in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "caller": (
        "{% macro m(n) %}{% if n %}{% call m(n-1) %}{{ n }}{% endcall %}{% call m(n-1) %}"
        "{% endcall %}{{ caller() }}{% endif %}{% endmacro %}{% call m(40) %}{% endcall %}"
    ),
    "product": "{{ 'ab' * 999999999 }}",
    "product of lists": "{{ [1] * 99999 * 99999 }}",
    "doubled by +": DOUBLED + " + n.x %}{% endfor %}",
    "doubled by ~": DOUBLED + " ~ n.x %}{% endfor %}",
    "doubled by join": DOUBLED + "|join(n.x) %}{% endfor %}",
    "doubled by replace": DOUBLED + ".replace('a', n.x) %}{% endfor %}",
    "doubled by format": DOUBLED + "|replace('b', n.x) %}{% endfor %}",
    "lists": DOUBLED.replace("'ab'", "[1]") + " + n.x %}{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "squares": DOUBLED.replace("'ab'", "3") + " * n.x %}{% endfor %}",
    "center": "{{ 'a'.center(999999999) }}",
    "center filter": "{{ 'a'|center(999999999) }}",
    "indent": "{{ 'a\nb'|indent(999999999) }}",
    "width": "{{ '%999999999d' % 1 }}",
    "width filter": "{{ '%999999999d'|format(1) }}",
    "width argument": "{{ '%*d'|format(999999999, 1) }}",
    "width of format": "{{ '{:>999999999}'.format(1) }}",
    "width in a field": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "json": "{{ [[1]]|tojson(indent=999999999) }}",
    "slices": "{{ [1]|batch(999999999, 0)|list }}",
    "text": "{{ lipsum(n=999) }}",
    "range": "{{ range(999999999)|list }}",
    "outputs": LONG + "{% for i in range(9999) %}{{ s }}{% endfor %}",
    "captured outputs": LONG
    + "{% set t %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endset %}",
    "join of a list": LONG + "{{ ([s] * 999)|join|length }}",
    "join of a stream": LONG + "{{ (range(9999)|map('replace', '', s))|join|length }}",
    "method join": LONG + "{{ ''.join([s] * 999)|length }}",
    "many ~": LONG + "{{ s" + " ~ s" * 999 + " }}",
    "many fields": LONG + "{{ ('{0}' * 999).format(s)|length }}",
    "many fields of %": LONG + "{{ ('%(s)s' * 999)|format(s=s)|length }}",
    "indents": "{{ ('a\n' * 5000)|indent(1000000)|length }}",
    "lists of lists": NESTED + "{{ n.x }}",
    "compared lists": NESTED + "{% set a = n.x %}" + NESTED + "{{ n.x == a }}",
    "late lists": (
        "{% set n, m = namespace(x=1), namespace(x=1) %}{% set n.x = [m] * 9000 %}"
        "{% set m.x = [0] * 9000 %}{{ n }}"
    ),
    "kept slices": (
        LONG + "{% set n = namespace(x=[]) %}{% for i in range(999) %}"
        "{% set n.x = n.x + [s[i:]] %}{% endfor %}"
    ),
    "wrapped lines": "{{ ('a' * 1000000)|wordwrap(1)|length }}",
    "sum of lists": "{{ (range(20000)|batch(1)|sum(start=[]))|length }}",
    "bytes": "{{ (1).to_bytes(999999999, 'big')|length }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_jinja, "MAX_STEPS", 10_000)
    monkeypatch.setattr(bounded_jinja, "MAX_SIZE", 200_000)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ValueError, match="the chat template"):
            ChatTemplate(HOSTILE[name]).render(CHAT)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 4


# Calls whose time grows with the square of a text, and the reason for their errors.
QUADRATIC = {
    "(s ~ 'é').encode('punycode')": "encoding 'punycode'",
    "s.encode(encoding='idna')": "encoding 'idna'",
    "(s ~ 'é').encode('ascii', 'namereplace')": "encoding 'namereplace'",
    "s.encode().decode('PUNYCODE')": "encoding 'PUNYCODE'",
    "s.rfind(t)": "150,000 letters with 40,001 in rfind",
    "s.rindex(t, 3)": "in rindex",
    "s.rsplit(t, 1)": "in rsplit",
    "s.rsplit(maxsplit=1, sep=t)": "in rsplit",
    "s.rpartition(t)": "in rpartition",
    "s.encode().rfind(t.encode())": "in rfind",
    "s.strip(t)": "in strip",
    "s.lstrip(t)": "in lstrip",
    "s.rstrip(t)": "in rstrip",
    "s|trim(t)": "in trim",
}


@pytest.mark.parametrize("call", QUADRATIC)
def test_quadratic_call_is_an_error(call: str) -> None:
    text = LONG + "{% set t = 'b' ~ s[:40000] %}{{ (" + call + ")|length }}"
    with pytest.raises(ValueError, match=re.escape(QUADRATIC[call])):
        ChatTemplate(text).render(CHAT)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_by_its_limits(name: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="the chat template"):
        ChatTemplate(HOSTILE[name]).render(CHAT)
    assert time.process_time() - start < 30


HARMLESS = (
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content|trim|upper }}{% else %}x{% endfor %}",
    "{% for k, v in {'b': 1, 'a': [2]}.items() %}{{ k ~ v ~ '!' }}{% endfor %}",
    "{{ messages|map(attribute='content')|join(', ') }}{{ (1 ~ 2)|int + 3 }}",
    "{% for i in [[1, [2]], 3] recursive %}{% if i is iterable %}{{ loop(i) }}{% else %}{{ i }}"
    "{% endif %}{% endfor %}",
    "{{ '%.2f|%s' % (1.5, 'x') }}{{ '{}-{:>5}'.format(1, 2) }}{{ 2 ** 10 }}{{ 7 // 2 }}",
    "{% macro m(x, n=2) %}{{ x * n }}{% endmacro %}{{ m('ab') }}{{ m([1], n=3) }}",
    "{% set n = namespace(found=false) %}{% for c in 'abc' %}{% if c == 'b' %}"
    "{% set n.found = true %}{% break %}{% endif %}{% endfor %}{{ n.found }}",
    "{{ messages[0]|tojson }}{{ messages[::-1]|length }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|count }}",
    "{{ 'a</think>b'.rsplit('</think>', 1)[-1] }}{{ 'xaab'.rfind('a') }}{{ 'xaax'.strip('x') }}"
    "{{ 'é'.encode('UTF_8')|length }}{{ 'é'.encode('ascii', errors='ignore').decode() }}",
    "{{ 'x y z'.split(' ')[-1].lstrip().center(9) }}{{ [1, 2]|sum }}{{ {'a': 1}|dictsort }}",
)


@pytest.mark.parametrize("text", HARMLESS)
def test_render_agrees_with_plain_jinja(text: str) -> None:
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    bounded = bounded_jinja.BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    values = {"messages": [*CHAT, {"role": "assistant", "content": " a\n"}]}
    assert bounded.from_string(text).render(values) == plain.from_string(text).render(values)


def test_long_chat_is_within_the_limits() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% for n in messages[-50:] %}{{ n.role[0] }}{% endfor %}"
        "{{ m.content ~ '</s>' }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "word " * 100}] * 2_000
    assert len(template.render(chat)) == 2_000 * (50 + 500 + 4)


def test_real_operations_on_a_long_text() -> None:
    text = (
        "{% set c = messages[0].content %}{{ c.split('</think>')[-1]|trim|replace('a', 'b') }}"
        "{{ messages|map(attribute='content')|join('\n') }}{{ '%s: %s' % ('x', c) }}"
        "{{ c|indent(4) }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|tojson(indent=4) }}"
        "{{ c|truncate(2000) }}{{ c.splitlines()[:3] }}{{ c.rstrip() ~ c[1:] }}"
    )
    values = {"messages": [{"role": "user", "content": "word word\n" * 30_000}]}
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment()
    bounded = bounded_jinja.BoundedEnvironment()
    assert bounded.from_string(text).render(values) == plain.from_string(text).render(values)


def test_lack_of_memory_is_not_blamed_on_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise MemoryError

    monkeypatch.setattr(bounded_jinja.BoundedEnvironment, "concat", fail)
    with pytest.raises(MemoryError, match="memory ran out while the chat template"):
        ChatTemplate("x").render(CHAT)


# The lowest releases without a known escape or crash by content of a file.
LOWEST = {
    "jinja2": "3.1.6",  # CVE-2025-27516: the filter attr leads out of the sandbox.
    "pyyaml": "5.4",  # CVE-2020-14343: code from YAML.
    "pyarrow": "14.0.1",  # CVE-2023-47248: code from Arrow and Parquet files.
    "safetensors": "0.4",
    "tokenizers": "0.20",
}


def test_lowest_versions_are_safe() -> None:
    project = tomllib.loads(
        (pathlib.Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    requirements = {one.name.lower(): one for one in map(Requirement, texts)}
    for name, lowest in LOWEST.items():
        bounds = [one for one in requirements[name].specifier if one.operator == ">="]
        assert bounds, name
        assert Version(bounds[0].version) >= Version(lowest), name
        assert Version(importlib.metadata.version(name)) in requirements[name].specifier


def test_template_does_not_leave_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hf_token")
    for escape in (
        "{{ ('{0.__func__.__globals__[os].environ[A_SECRET]}'|attr('format'))(strftime_now) }}",
        "{{ strftime_now.__globals__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages|map('attr', '__class__')|list }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
    ):
        try:
            text = ChatTemplate(escape).render(CHAT)
        except ValueError:
            continue
        assert "hf_token" not in text
        assert "class" not in text
