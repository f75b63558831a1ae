"""Saved prompts: what they may hold, how they are filled in, and `localmoe templates`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from localmoe.cli import config_file, prompt_template
from localmoe.cli.prompt_template import PromptTemplate
from localmoe.errors import UsageError


def write(name: str, text: str) -> Path:
    path = prompt_template.directory() / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def asked(engine) -> str:
    return engine.calls[-1]["prompt"][-1]["content"]


@pytest.mark.parametrize(
    ("prompt", "params", "text", "expected"),
    [
        ("Sum up: {input}", {}, "a\nb", "Sum up: a\nb"),
        ("Sum up:", {}, "text", "Sum up:\ntext"),
        ("Sum up.", {}, "", "Sum up."),
        ("{a}{b}{a}", {"a": "1", "b": "2"}, "", "121"),
        ("{a} {input}", {"a": "{input} {b} {{a}} \\1"}, "{a}", "{input} {b} {{a}} \\1 {a}"),  # nothing twice
        ('{{a}} {"k": {"v": 1}} {} { a } {0} {input}', {}, "x", '{a} {"k": {"v": 1}} {} { a } {0} x'),
        ("{{{input}}}", {}, "x", "{{input}}\nx"),
    ],
)
def test_fill(prompt, params, text, expected):
    assert PromptTemplate("t", prompt).fill(params, text).prompt == expected


def test_a_parameter_too_many_or_too_few():
    template = PromptTemplate("t", "{language} {tone} {input}", "Speak {language}", params={"tone": "kind"})
    with pytest.raises(UsageError, match="template t needs --param language="):
        template.fill({}, "x")
    with pytest.raises(UsageError, match=r"has no \{langauge\}; did you mean language\?"):
        template.fill({"langauge": "French"}, "x")
    filled = template.fill({"language": "French", "tone": "curt"}, "x")
    assert (filled.prompt, filled.system) == ("French curt x", "Speak French")


def test_run_with_a_template(invoke, engine):
    write("tr", 'prompt = "Into {to}: {input}"\nsystem = "You know {to}"\n[params]\nto = "French"\n')
    assert invoke("run", "demo", "--template", "tr", "Hello", stdin=b"you\n").status == 0
    assert engine.calls[-1]["prompt"][0] == {"role": "system", "content": "You know French"}
    assert asked(engine) == "Into French: Hello\nyou"
    assert invoke("run", "demo", "--template", "tr", "--param", "to=Dutch", "--system", "S", "Hello").status == 0
    assert [message["content"] for message in engine.calls[-1]["prompt"]] == ["S", "Into Dutch: Hello"]
    outcome = invoke("run", "demo", "--template", "tr", terminals=("stdin",))
    assert (outcome.status, "nothing to ask" in outcome.err) == (2, True)


def test_a_template_without_input_needs_none(invoke, engine):
    write("joke", 'prompt = "Tell a joke"\n')
    assert invoke("run", "demo", "--template", "joke", terminals=("stdin",)).status == 0
    assert asked(engine) == "Tell a joke"
    assert invoke("run", "demo", "--template", "joke", stdin=b"of a fox\n").status == 0
    assert asked(engine) == "Tell a joke\nof a fox"


def test_settings_come_after_flags_and_before_the_config_file(invoke, engine):
    write("t", 'prompt = "P"\ntemperature = 0.2\ntop_p = 0.5\nmax_tokens = 2\nstop = ["X"]\nmtp = 1\nthink = false\n')
    config_file.path().write_text("[run]\nmax_tokens = 1\nseed = 9\ntop_p = 0.9\nthink = true\n")
    engine.template = "switch"
    assert invoke("run", "demo", "--template", "t", "--temp", "0.7").status == 0
    call = engine.calls[-1]
    assert (call["temperature"], call["top_p"], call["max_tokens"], call["seed"]) == (0.7, 0.5, 2, 9)
    assert (call["stop"], call["thinking"], engine.machine.mtp) == (("X",), False, 1)
    assert invoke("run", "demo", "--template", "t", "--think").status == 0
    assert engine.calls[-1]["thinking"] is True
    engine.template = "plain"  # without a switch
    assert invoke("run", "demo", "--template", "t").status == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../config", "cannot be a template's name"),
        ("/etc/passwd", "cannot be a template's name"),
        ("a.b", "cannot be a template's name"),
        ("", "cannot be a template's name"),
        ("x" * 65, "cannot be a template's name"),
        ("jok", "no template is called 'jok'; did you mean joke?"),
        ("-", "cannot be a template's name"),
    ],
)
@pytest.mark.parametrize("command", [("run", "demo", "--template"), ("templates", "show"), ("templates", "rm")])
def test_a_name_is_never_a_path(invoke, engine, name, message, command):
    write("joke", 'prompt = "P"\n')
    config_file.path().write_text("")
    outcome = invoke(*command, "--", name) if command[0] == "templates" else invoke(*command, name, "Hi")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert message in outcome.err
    assert config_file.path().exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a prompt"),
        ("prompt = 1", "prompt: a text in quotation marks is needed, not 1"),
        ("promt = 'x'", "a template has no 'promt'; did you mean prompt?"),
        ("prompt = 'x'\ntemprature = 1", "did you mean temperature?"),
        ("prompt = 'x'\ntemperature = -1", "temperature: a temperature is at least 0"),
        ("prompt = 'x'\ndevice = 'cpu'", "a template has no 'device'"),
        ("prompt = 'x'\n[params]\ny = 'z'", "[params] y: there is no {y} to stand for"),
        ("prompt = '{y}'\n[params]\ny = 1", "[params] holds a text for each name"),
        ("prompt = '{input}'\n[params]\ninput = 'z'", "[params] input"),
        ("prompt = ", "cannot be read"),
    ],
)
def test_what_is_wrong_is_refused_by_name(invoke, engine, text, message):
    path = write("t", text)
    outcome = invoke("run", "demo", "--template", "t", "Hi")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert f"localmoe: {path}: " in outcome.err
    assert message in outcome.err
    listed = invoke("templates", "list", "--json").json["templates"]
    assert [each["name"] for each in listed] == ["t"]
    assert message in listed[0]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--param", "a=b"], "add --template NAME"),
        (["--template", "t", "--param", "a"], "'a' is not NAME=VALUE"),
        (["--template", "t", "--param", "input=b"], "is not NAME=VALUE"),
        (["--template", "t", "--param", "a=b"], "has no {a}; it has none"),
        (["--template", "t", "--raw"], "has a system prompt"),
    ],
)
def test_wrong_usage(invoke, engine, arguments, message):
    write("t", 'prompt = "{input}"\nsystem = "S"\n')
    outcome = invoke("run", "demo", "Hi", *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert not engine.calls


def test_alone_it_lists(invoke):
    assert invoke("templates", "add", "joke", "Tell a joke about {input}").status == 0
    alone = invoke("templates")
    assert alone == invoke("templates", "list")
    assert "joke" in alone.out


def test_add_show_list_rm(invoke):
    prompt = 'Review """this""" \\ code:\n\n{input}\n{{x}} for {whom}\n'
    outcome = invoke(
        *("templates", "add", "review", prompt, "--system", "Be strict", "--description", "A review"),
        *("--param", "whom=all", "--set", "temperature=0.5", "--set", "stop=A", "--set", "stop=B", "--set", "think=no"),
    )
    assert outcome.status == 0
    assert outcome.err.endswith("review.toml; it takes {input}, {whom}\n")
    record = {
        "name": "review",
        "prompt": prompt,
        "system": "Be strict",
        "description": "A review",
        "fields": ["input", "whom"],
        "params": {"whom": "all"},
        "settings": {"temperature": 0.5, "stop": ["A", "B"], "think": False},
    }
    assert invoke("templates", "show", "review", "--json").json == record
    assert invoke("templates", "list", "--json").json["templates"] == [record]
    shown = invoke("templates", "show", "review").out
    assert tomllib.loads(shown)["prompt"] == prompt
    assert 'prompt = """\n' in shown
    assert "review    input whom  A review" in invoke("templates", "list").out
    assert "--force replaces it" in invoke("templates", "add", "review", "other").err
    assert invoke("templates", "add", "review", "--force", "--json", stdin=b"other\n").json["prompt"] == "other\n"
    assert invoke("templates", "rm", "review", "--json").status == 0
    assert "makes one" in invoke("templates", "list").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t", "P", "--set", "temprature=1"], "--set: no setting 'temprature'; did you mean temperature?"),
        (["t", "P", "--set", "max_tokens=many"], "--set max_tokens: a whole number"),
        (["t", "P", "--param", "x=1"], "there is no {x} to stand for"),
        (["t", ""], "needs a prompt"),
        (["t", "P", "-f", "x"], "not both"),
        (["a/b", "P"], "cannot be a template's name"),
    ],
)
def test_add_refuses(invoke, arguments, message):
    outcome = invoke("templates", "add", *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert prompt_template.names() == []


def test_any_text_is_saved_as_it_is(invoke):
    for prompt in ('"""', "\\", "\n\n", 'a\n""""', "a\r\nb", "\x00\x1b\x7f\n", "\u2028龍\n"):
        assert invoke("templates", "add", "t", "--force", stdin=prompt.encode()).status == 0
        assert prompt_template.load("t").prompt == prompt
    assert json.loads(invoke("templates", "show", "t", "--json").out)["prompt"] == "\u2028龍\n"
