"""A Jinja environment for templates nobody has read.

Jinja's immutable sandbox keeps a template away from Python's internals. It does not keep it from using up the
machine: nested loops without end, or a string doubled forty times, are legal. So a rendering gets a deadline,
looked at in every loop turn and macro call, and an allowance for the values it makes; the few operations that
make something huge out of something small are priced before they run.
"""

from __future__ import annotations

import functools
import json
import math
import re
import string
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Template, TemplateRuntimeError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from jinja2.parser import Parser

DEADLINE_SECONDS = 10.0  # a long conversation renders in milliseconds
MAX_TEXT = 16_000_000  # characters of any one string: past every model's context
_ALLOWANCE = 400_000_000  # characters made in one rendering, garbage included
_ELEMENT = 128  # an element of a container, in characters: the bytes of an object and more
_MAX_WIDTH = 10_000
_NUMBER = 400  # characters of a number in a format: 1e308 written out has 309 and six behind the point
_LONGEST_DATE = 100  # characters of strftime's pattern, each of which may become 256
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines

# Not needed by any published chat template, and not reproducible or hard to price.
_REMOVED_FILTERS = ("pprint", "random", "urlize", "xmlattr", "wordwrap")
_REFUSED_METHODS = ("encode", "to_bytes", "translate")
# fmt: off
_TAKES_WIDTH = frozenset((
    "batch", "center", "expandtabs", "indent", "ljust", "lstrip", "rjust", "round", "rstrip", "slice", "strip",
    "tojson", "trim", "truncate", "zfill",
))
# Filters that leave the elements of a container alone; every other one may spell the whole of it out as text.
_KEEPS_ELEMENTS = frozenset((
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list",
    "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
))
# fmt: on


class LimitError(TemplateRuntimeError):
    """The rendering wants more time or memory than a chat template needs."""


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment transformers renders chat templates in, with limits; one rendering at a time."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=self.pay_for_text,
        )
        self._start()
        filters = {**self.filters, "tojson": self._tojson}
        self.filters = {
            name: self._priced(name, function) for name, function in filters.items() if name not in _REMOVED_FILTERS
        }
        self.globals = {
            "range": self.globals["range"],  # SandboxedEnvironment's own, of at most 100,000 numbers
            "dict": _new_dict,
            "namespace": _SafeNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def prepare(self, text: str) -> Template:
        """Parse a template, put the meter in, compile it. Raises jinja2.TemplateSyntaxError."""
        self._start()  # compiling computes what is constant
        metered: nodes.Template = _Meter().visit(self.parse(text))
        return self.template_class.from_code(self, self.compile(metered), self.make_globals(None))

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Run a prepared template. Raises LimitError, and whatever the template raises."""
        self._start()
        parts: list[str] = []
        length = 0
        for part in template.generate(**variables):
            parts.append(part)
            length += len(part)
            self._check_text(length)
        return "".join(parts)

    def tick(self, written: int = 0) -> None:
        """One turn of a loop or call of a macro, whose body writes `written` characters of the template's own."""
        self._spend(written)

    def pay_for(self, value: Any) -> Any:
        """Charge for a value just made and hand it on. Elements are counted through all levels: a list that
        holds itself twice, forty levels deep, is small in memory and endless to anyone who walks it."""
        if isinstance(value, str):
            self._check_text(len(value))
            self._spend(len(value))
        else:
            self._walk(value, count_text=False)
        return value

    def pay_for_text(self, value: Any) -> Any:
        """Charge for spelling a value out, before it is done, and hand it on."""
        self._walk(value, count_text=True)
        return value

    def concatenate(self, *parts: Any) -> str:
        """The `~` operator."""
        return "".join(str(part) for part in self.pay_for_text(parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator the class intercepts, priced before it is computed."""
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if operator == "**" or max(abs(left), abs(right)) > 1e15:
                raise LimitError(f"numbers too large for `{operator}`")
        elif operator == "*":
            sequence, count = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(sequence, Sequence) and isinstance(count, int):
                self._check_text(len(sequence) * max(count, 0))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, (tuple, Mapping)) else (right,))
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            self._check_text(len(left) + len(right))
        return self.pay_for(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as Jinja has it
        """A call in the template. Methods of strings and numbers are priced as filters are."""
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps str.format
        subject = getattr(method, "__self__", None)
        if isinstance(subject, (str, int)):
            __self._check_operation(method.__name__, subject, args, kwargs)
        return __self.pay_for(super().call(__context, __obj, *args, **kwargs))

    def _start(self) -> None:
        self._allowance = _ALLOWANCE
        self._deadline = time.monotonic() + DEADLINE_SECONDS

    def _priced(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is priced before it runs and paid for afterwards."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # some get the environment or context first

        @functools.wraps(function)  # copies Jinja's marks on the function, too
        def priced(*args: Any, **kwargs: Any) -> Any:
            subject, *others = args[first:]
            if not isinstance(subject, (str, Mapping, Sequence, Undefined)) and isinstance(subject, Iterable):
                subject = list(subject)  # a generator of another filter, which would be used up by looking
            if not isinstance(subject, str) and name not in _KEEPS_ELEMENTS:
                self.pay_for_text(subject)
            self._check_operation(name, subject, others, kwargs)
            return self.pay_for(function(*args[:first], subject, *others, **kwargs))

        return priced

    def _check_operation(self, name: str, subject: Any, others: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Price what a filter or string method would make, where that can be far larger than what it is given."""
        arguments = [*others, *named.values()]
        if name in _REFUSED_METHODS:
            raise SecurityError(f"`{name}` is not allowed in a chat template")
        if name in _TAKES_WIDTH:
            width = max(
                (len(a) if isinstance(a, str) else abs(a) for a in arguments if isinstance(a, (str, int))), default=8
            )
            if width > _MAX_WIDTH:
                raise LimitError(f"a width of {width} for `{name}`")
            if isinstance(subject, str):
                wide = sum(map(subject.count, _LINE_ENDS + "\t"))
                self._check_text(len(subject) + max(width, 8) * (1 + wide))
        elif name in ("format", "format_map"):
            self._check_format(str(subject), arguments)
        elif name == "replace":
            by_name = [named[key] for key in ("old", "new") if key in named]
            old, new = (str(self.pay_for_text(a)) for a in [*others, *by_name, "", ""][:2])
            self._check_text(len(str(subject)) + str(subject).count(old) * len(new))
        elif name == "join":
            self.pay_for_text([subject, *arguments])  # `'-'.join(x)` and `x|join('-')` alike
            counts = [len(a) for a in (subject, *arguments) if isinstance(a, (Sequence, Mapping))]
            self._check_text(math.prod(counts))
        elif name == "sum" and isinstance(subject, Sequence):
            for item in subject:
                self._walk(item, count_text=False)

    def _check_format(self, pattern: str, values: Iterable[Any]) -> None:
        """Widths come written out or from a `*`: all are bounded, and every field priced as the longest value."""
        if _has_nested_fields(pattern):
            raise LimitError("a format whose widths are fields")
        items = list(values.values() if isinstance(values, Mapping) else values)
        widths = [int(digits[:9]) for digits in re.findall(r"\d+", pattern)]
        if "*" in pattern:
            widths += [abs(item) for item in items if isinstance(item, int)]
        if max(widths, default=0) > _MAX_WIDTH:
            raise LimitError(f"a width of {max(widths)} in a format")
        longest = max((self._walk(item, count_text=True) for item in items), default=0)
        fields = pattern.count("{") + pattern.count("%")
        self._check_text(len(pattern) + (max(longest, _NUMBER) + max(widths, default=0)) * fields)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Iterable[str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers' templates expect it; Jinja's own filter escapes for HTML."""
        between = None if separators is None else tuple(separators)
        if indent is not None or between is not None:  # else it is not much longer than the value
            step = len(indent) if isinstance(indent, str) else int(indent or 0)
            elements, depth = _extent(value)
            self._check_text(elements * (step * depth + sum(map(len, between or ()))))
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=between,  # type: ignore[arg-type]  # it says what is wrong with others than two
            sort_keys=sort_keys,
        )

    def _walk(self, value: Any, *, count_text: bool) -> int:
        """Charge for all that a value holds, its texts and long numbers included if they count; returns the charge."""
        pending, characters, elements = [value], 0, 0
        while pending:
            item = pending.pop()
            if isinstance(item, Namespace):
                item = object.__getattribute__(item, "_Namespace__attrs")  # spelled out, it shows them
            if isinstance(item, str):
                characters += len(item) if count_text else 0
            elif isinstance(item, int):
                characters += item.bit_length() // 4 if count_text else 0  # hexadecimal digits
            elif isinstance(item, Collection) and not isinstance(item, range):
                self._spend(_ELEMENT * len(item))
                elements += len(item)
                pending += item
                pending += item.values() if isinstance(item, Mapping) else ()
            self._check_text(characters)
        self._spend(characters)
        return characters + _ELEMENT * elements

    def _check_text(self, characters: int) -> None:
        if characters > MAX_TEXT:
            raise LimitError(f"it makes a text of more than {MAX_TEXT:,} characters")

    def _spend(self, characters: int) -> None:
        self._allowance -= characters
        if self._allowance < 0:
            raise LimitError("it makes more values than a chat template may")
        if time.monotonic() > self._deadline:
            raise LimitError(f"it runs for more than {DEADLINE_SECONDS:.0f} seconds")


class _Meter(NodeTransformer):
    """Puts calls of the sandbox into a parsed template: at loop turns and macro calls, container literals, `~`."""

    def _with_tick(self, node: Any) -> Any:
        self.generic_visit(node)
        written = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("tick", [nodes.Const(written)]), lineno=node.lineno))
        return node

    def _paid(self, node: Any) -> Any:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") == "store"  # `for key, value in`
        return node if is_target else _call("pay_for", [node])

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802  # Jinja's naming of visitors
        self.generic_visit(node)
        return _call("concatenate", node.nodes)

    visit_For = visit_Macro = visit_CallBlock = _with_tick  # noqa: N815
    visit_List = visit_Tuple = visit_Dict = _paid  # noqa: N815


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  # a plain class attribute in Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """`namespace()` that takes no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without a name for self, as in Jinja: any key is allowed
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRuntimeError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _LONGEST_DATE:
        raise LimitError(f"a date's pattern of {len(pattern)} characters")
    return datetime.now().strftime(pattern)


def _has_nested_fields(pattern: str) -> bool:
    """Whether it has a field like `{:{}}`, whose width or precision is a value, a text too."""
    try:
        return any("{" in (form or "") for _, _, form, _ in string.Formatter().parse(pattern))
    except ValueError:  # no pattern of str.format's
        return False


def _extent(value: Any) -> tuple[int, int]:
    """(elements of all levels, how many levels there are), of a value that `_walk` has found to be finite."""
    level, elements, depth = [value], 0, 0
    while level:
        elements, depth = elements + len(level), depth + 1
        inside = [
            item.values() if isinstance(item, Mapping) else item
            for item in level
            if isinstance(item, (Mapping, list, tuple))
        ]
        level = [item for items in inside for item in items]
    return elements, depth
