"""Templates that want to use up the machine are stopped soon, and long conversations are not."""

# ruff: noqa: E501
from __future__ import annotations

import json
import resource
import time

import pytest

from localmoe.errors import TemplateError
from localmoe.text import ChatTemplate, sandbox

LOOPS = {
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "filtered": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "comparison": "{% set ns = namespace(a=range(99999) | list, b=range(99999) | list) %}"
    "{% for i in range(99999) %}{% if ns.a == ns.b %}{% endif %}{% endfor %}",
}
HUGE = {
    "times": "{{ 'x' * 10 ** 3 * 10000000 }}",
    "times list": "{{ ([1] * 999999999) | length }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "tilde": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "replace method": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "replace nothing": "{% set x = 'a' * 100000 %}{{ x.replace('', x) }}",
    "replace by name": "{% set x = 'a' * 1000000 %}{{ x | replace(new=x, old='a') }}",
    "join": "{{ range(99999) | join('y' * 99999) }}",
    "join method": "{{ ('y' * 99999).join(('z' * 99999) | list) }}",
    "join of one text": "{% set x = 'y' * 9999999 %}{{ [x, x, x] | join }}",
    "center": "{{ 'x' | center(999999999) }}",
    "ljust": "{{ 'x'.ljust(999999999) }}",
    "indent": "{{ ('\n' * 9999999) | indent(9999) }}",
    "indent by a text": "{{ ('a\n' * 1000) | indent('x' * 16000000) }}",
    "indent by a named text": "{{ ('a\n' * 1000) | indent(width='x' * 16000000) }}",
    "indent of other lines": r"{{ ('a\r' * 4000000) | indent(9999) }}",
    "format": "{{ '%999999999d' | format(1) }}",
    "format method": "{{ '{:>999999999}'.format(1) }}",
    "format nested": "{{ '{:>{}}'.format(1, 999999999) }}",
    "format nested text": "{{ '{:{}}'.format(1, '>9999999999') }}",
    "format of a list": "{{ ('{0}' * 5000000).format(['x' * 5000]) }}",
    "format of a namespace": "{% set ns = namespace(x='x' * 5000) %}{{ ('{0.x}' * 3000000).format(ns) }}",
    "format of a number": "{{ ('%x' * 100000) % ((('f' * 1000000) | int(0, 16),) * 100000) }}",
    "format star": "{{ '%*d' % (999999999, 1) }}",
    "percent": "{{ '%999999999s' % 'x' }}",
    "tojson": "{{ [1] | tojson(indent=999999999) }}",
    "tojson indent by a text": "{{ range(999) | list | tojson(indent='x' * 16000000) }}",
    "tojson indent, deep": "{% set ns = namespace(d=range(9999) | list) %}{% for i in range(90) %}{% set ns.d = [ns.d] %}{% endfor %}"
    "{{ ns.d | tojson(indent=9999) }}",
    "tojson separators": "{{ range(999) | list | tojson(separators=('x' * 16000000, ':')) }}",
    "tojson separators, generated": "{{ range(999) | list | tojson(separators=['x' * 16000000, ':'] | map('string')) }}",
    "strftime_now": "{{ strftime_now('%255d' * 3000000) }}",
    "bytes": "{{ (1).to_bytes(9999999999, 'big') | length }}",
    "nested lists": "{% set ns = namespace(d=[1]) %}{% for i in range(99) %}{% set ns.d = [ns.d, ns.d] %}{% endfor %}{{ ns.d | length }}",
    "nested dicts": "{% set ns = namespace(d=1) %}{% for i in range(99) %}{% set ns.d = dict(a=ns.d, b=ns.d) %}{% endfor %}",
    "shared text": "{% set x = 'x' * 9999999 %}{{ [x] * 9999 }}",
    "shared text in a namespace": "{% set ns = namespace(x='x' * 9999999) %}{{ [ns] * 9999 }}",
    "shared text in a view": "{% set d = dict(a='x' * 9999999) %}{{ [d.items()] * 9999 }}",
    "shared text tojson": "{% set x = 'x' * 9999999 %}{{ ([x] * 9999) | tojson }}",
    "sum": "{% set x = 'ab' * 99999 %}{{ ([x | list] * 99999) | sum(start=[]) | length }}",
    "mapped": "{{ ['x'] | map('center', 999999999) | list }}",
    "slice": "{{ [1] | slice(999999999) | list }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "translate": "{{ 'aaa'.translate({97: 'x' * 99999}) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "constant": "{{ 'x' | center(99999999999) }}",
    "set block": "{% set x %}{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}{% endset %}",
    "block": "{% block a %}x{{ self.a() }}{{ self.a() }}{% endblock %}",
    "dict keys": "{% set x = 'x' * 9999999 %}{{ [{x: 1}] * 9999 }}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "accumulated": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + ['x' * 999999] %}{% endfor %}",
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_endless_loops_meet_the_deadline(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "DEADLINE_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"runs for more than|recursion"):
        ChatTemplate(source, special_tokens={}).render([])
    assert time.monotonic() - started < 20  # without the deadline it would be hours


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_huge_values_are_refused_before_they_are_made(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source, special_tokens={}).render([])
    assert not isinstance(caught.value.__cause__, MemoryError)
    assert time.monotonic() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024  # KiB


def test_a_long_conversation_is_well_within_the_limits() -> None:
    source = (
        "{% set ns = namespace(text='', kept=[]) %}{% for m in messages %}{% set ns.text = ns.text + m.content | trim %}"
        "{% set ns.kept = ns.kept + [m] %}{% if messages | length > 3 and loop.index < messages | length %}{% endif %}"
        "{% endfor %}{{ ns.text }}{{ ns.kept | length }}"
    )
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " * 300} for i in range(600)]
    started = time.monotonic()
    text = ChatTemplate(source, special_tokens={}).render(chat)
    assert text == "".join(m["content"].strip() for m in chat) + "600"
    assert time.monotonic() - started < 30


def test_every_rendering_starts_with_a_full_allowance() -> None:
    template = ChatTemplate("{% for i in range(9) %}{{ ('x' * 9999999) | length }}{% endfor %}", special_tokens={})
    for _ in range(6):
        assert template.render([]) == "9999999" * 9


ORDINARY = {
    "{{ nothing | default('yes') }}": "yes",
    "{{ nothing | default([1]) | length }}": "1",
    "{{ 'a\nb\nc' | indent('> ') }}": "a\n> b\n> c",
    "{{ {'a': [1, 2]} | tojson(indent='\t') }}": '{\n\t"a": [\n\t\t1,\n\t\t2\n\t]\n}',
    "{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}": '{"a":[1,2]}',
    "{{ {'a': [1, 2]} | tojson }}": '{"a": [1, 2]}',
    "{{ 'aXb' | replace(new='-', old='X') }}": "a-b",
    "{{ '{{\"a\": {:>4}}}'.format(7) }}": '{"a":    7}',
    "{{ '%s: %05.1f' | format('x', 2.5) }}": "x: 002.5",
    "{{ '  a\n' | trim }}|{{ '--a'.lstrip('-') }}": "a|a",
    "{{ strftime_now('%%') }}": "%",
}


@pytest.mark.parametrize(("source", "text"), ORDINARY.items())
def test_what_templates_use_is_as_jinja_has_it(source: str, text: str) -> None:
    assert ChatTemplate(source, special_tokens={}).render([]) == text


def test_a_large_document_as_json_is_within_the_limits() -> None:
    chat = [{"role": "tool", "content": [{"name": f"row {i}", "values": [i, [i, {"a": i}]]} for i in range(5000)]}]
    text = ChatTemplate("{{ messages | tojson(indent=4) }}", special_tokens={}).render(chat)
    assert json.loads(text) == chat
