"""The config file: what it may hold, who it gives way to, and `localmoe config`, which leaves the rest as it was."""

from __future__ import annotations

import random
import stat
import string
import tomllib
from pathlib import Path

import pytest
import typer

from localmoe.cli import config_file
from localmoe.cli.app import _Commands, app
from localmoe.cli.toml_edit import literal, with_setting, without_setting
from localmoe.cli.values import near_miss
from localmoe.errors import UsageError

NOT_IN_THE_FILE = {  # what a command is asked for once: its input, its output, what would change what a script reads
    "run": {
        "explain_speed",
        "yes",
        "prompt_text",
        "file",
        "jsonl",
        "template",
        "param",
        "logit_bias",
        "raw",
        "show_thinking",
        "logprobs",
        "think_to",
        "session",
        "when_full",
        "schema",
        "grammar",
        "choice",
    },
    "chat": {"logit_bias", "explain_speed", "yes", "session", "when_full"},
    "bench": {"explain_speed", "plot_to"},
    "eval": {"text", "reference", "layerwise", "by_class", "plot"},
    "plan": {"recipe"},
}


def write(text: str) -> Path:
    path = config_file.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("command", config_file.COMMANDS)
def test_every_setting_is_an_option_and_every_option_a_setting(command):
    group = typer.main.get_command(app)
    assert isinstance(group, _Commands)
    parameters = {each.name for each in group.get_command(None, command).params}
    settings = {key.parameter for key in config_file.COMMANDS[command].values()}
    assert settings <= parameters
    assert parameters - settings - {"model", "as_json", "debug"} == NOT_IN_THE_FILE.get(command, set())


def test_a_flag_before_the_commands_table_before_options_before_sampling(invoke, engine):
    write(
        "[sampling]\ntemperature = 0.1\ntop_p = 0.1\nmin_p = 0.1\n"
        "[options]\nctx = 11\nmax_tokens = 1\nseed = 1\n"
        "[run]\nmax_tokens = 2\ntop_p = 0.2\nseed = 2\ntemperature = 0.2\n"
    )
    assert invoke("run", "demo", "Hi", "--temp", "0.3", "--seed", "3").status == 0
    call = engine.calls[0]
    assert (call["temperature"], call["top_p"], call["min_p"]) == (0.3, 0.2, 0.1)
    assert (call["seed"], call["max_tokens"], engine.machine.context) == (3, 2, 11)


def test_every_kind_of_setting_reaches_the_engine(invoke, engine):
    write(
        '[options]\ndevice = "cpu"\nkernels = "portable"\nthreads = 2\nram = "2GB"\ncache_dtype = "int8"\nmtp = 2\n'
        'deterministic = true\nstop = ["END", "FIN"]\nsystem = "Be brief"\n'
    )
    assert invoke("run", "demo", "Hi").status == 0
    machine, call = engine.machine, engine.calls[0]
    assert (machine.device, machine.kernels, machine.threads, machine.ram) == ("cpu", "portable", 2, 2 * 10**9)
    assert (machine.cache_dtype, machine.mtp, call["stop"]) == ("int8", 2, ("END", "FIN"))
    assert call["prompt"][0] == {"role": "system", "content": "Be brief"}
    write('[options]\nmtp = "auto"\n')
    assert invoke("run", "demo", "Hi").status == 0
    assert engine.machine.mtp is None


def test_what_a_model_cannot_do_gives_way(invoke, engine):
    write('[options]\nthink = true\nsystem = "Be brief"\n')
    assert invoke("run", "demo", "Hi").status == 0  # its template has no switch
    engine.template = "switch"
    assert invoke("run", "demo", "Hi").status == 0
    assert invoke("run", "demo", "Hi", "--no-think", "--system", "Be rude").status == 0
    assert invoke("run", "demo", "Hi", "--raw").status == 0
    assert [call["thinking"] for call in engine.calls] == [None, True, False, None]
    assert [call["prompt"][0]["content"] for call in engine.calls[:3]] == ["Be brief", "Be brief", "Be rude"]
    assert engine.calls[3]["prompt"] == "Hi"


def test_the_default_model(invoke, engine):
    outcome = invoke("run", "A story please")
    assert (outcome.status, outcome.out) == (2, "")
    assert "localmoe config set model NAME" in outcome.err
    write('model = "demo"\n')
    assert invoke("run", "A story please", stdin=b"now").status == 0
    assert engine.calls[-1]["prompt"][-1]["content"] == "A story please\nnow"
    assert invoke("run", stdin=b"by pipe").status == 0
    assert engine.calls[-1]["prompt"][-1]["content"] == "by pipe"
    assert invoke("run", "hello", stdin=b"by pipe").status == 1  # one word is a MODEL, always
    assert "demo/balanced" in invoke("show").err  # the model is found; this one has no weights
    assert invoke("rm").status == 2  # never what was not named


def test_aliases(invoke, engine):
    write('model = "fast"\n[alias]\nfast = "demo"\nfixed = "demo:balanced"\n')
    for model in ("fast", "fixed", "fast:balanced"):
        assert invoke("run", model, "Hi", "--json").json["model"] == "demo:balanced"
    assert invoke("run", "A question", "--json").json["model"] == "demo:balanced"
    assert "leave :compact out" in invoke("show", "fixed:compact").err
    assert "did you mean your alias fast?" in invoke("show", "fats").err
    assert "did you mean demo?" in invoke("show", "dmo").err
    assert "did you mean your alias fast?" in invoke("eval", "demo", "--text", __file__, "--reference", "fats").err
    assert invoke("rm", "fixed", "--json").status == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temp = 1\n", "is not a setting at the top of the file; it belongs under [sampling], as temperature"),
        ("temperature = 1\n", "'temperature' is not a setting at the top of the file; it belongs under [sampling]"),
        ("ctx = 1\n", "it belongs under [options]"),
        ("[smapling]\n", "'smapling' is not a setting; did you mean sampling?"),
        ("[run]\nmax_token = 5\n", "[run] has no setting 'max_token'; did you mean max_tokens?"),
        ("[chat]\ntemp = 1\n", "[chat] has no setting 'temp'; did you mean temperature?"),
        ("[run]\nmax_tokens = '5'\n", "[run] max_tokens: a whole number from 1 on is needed, not '5'"),
        ("[run]\nmax_tokens = 0\n", "a whole number from 1 on is needed, not 0"),
        ("[run]\nmax_tokens = true\n", "a whole number from 1 on is needed, not True"),
        ("[run]\nseed = 9223372036854775808\n", "a whole number from 0 on"),
        ("[chat]\nthink = 'yes'\n", "[chat] think: true or false is needed, not 'yes'"),
        ("[options]\nvram = 12\n", "[options] vram: a size"),
        ("[options]\nvram = '12'\n", "[options] vram: '12' is not a size"),
        ("[options]\ndevice = 'cudaa'\n", "is not one of auto, cpu, cuda; did you mean cuda?"),
        ("[options]\nmtp = 9\n", '"auto" or a number from 0 to 7'),
        ("[options]\nstop = 'END'\n", "a list of texts"),
        ("[options]\nstop = ['']\n", "a list of texts"),
        ("[options.ctx]\n", "a whole number from 1 on is needed, not a table"),
        ("model = ['demo']\n", "model: a text in quotation marks"),
        ("[alias]\n'../x' = 'demo'\n", "[alias] ../x: an alias is made of letters"),
        ("[alias]\ndemo = 'deepseek-r1'\n", "is a model's own name already"),
        ("[alias]\na = 'b:compact'\nb = 'demo'\n", "is an alias itself"),
        ("[alias]\na = 1\n", "[alias] a: a text"),
        ("run = 1\n", "run is not a table; write [run]"),
        ("[run]\n[run]\n", "cannot be read"),
        ("a = " + "[" * 3000, "cannot be read"),
    ],
)
def test_what_is_wrong_is_refused_by_name(invoke, engine, text, message):
    path = write(text)
    outcome = invoke("run", "demo", "Hi")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"localmoe: {path}: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not engine.calls
    assert invoke("run", "--help").status == 0  # help comes whatever the file is like
    assert invoke("config", "path").out == f"{path}\n"


def test_a_file_that_is_not_text(invoke, engine):
    path = write("")
    path.write_bytes(b"\xff")
    assert "cannot be read" in invoke("run", "demo", "Hi").err
    path.unlink()
    path.mkdir()
    assert "cannot be read: Is a directory" in invoke("run", "demo", "Hi").err


def test_an_option_that_nobody_typed_is_traced_to_the_file(invoke, engine, monkeypatch):
    def fail(*_, **__):
        raise UsageError("leave out --vram")

    monkeypatch.setattr(engine, "generate", fail)
    path = write('[options]\nvram = "1GiB"\n')
    assert invoke("run", "demo", "Hi").err == f"localmoe: leave out --vram (--vram is set in {path})\n"
    assert invoke("run", "demo", "Hi", "--vram", "2GiB").err == "localmoe: leave out --vram\n"


def test_set_get_list_unset(invoke):
    path = config_file.path()
    assert invoke("config", "list").err.startswith(f"nothing is set in {path}")
    assert invoke("config") == invoke("config", "list")
    for arguments in (
        ["model", "demo"],
        ["alias.v2.lite", "deepseek-v2-lite-chat:compact"],
        ["sampling.temperature", "0.7"],
        ["sampling.top_k", "40"],
        ["chat.think", "off"],
        ["run.stop", "END", 'say "FIN"\n'],
        ["options.mtp", "auto"],
        ["chat.system", "Sois bref.\\ 龍 \x7f\u2028"],
    ):
        assert invoke("config", "set", *arguments).status == 0, arguments
    expected = {
        "model": "demo",
        "alias.v2.lite": "deepseek-v2-lite-chat:compact",
        "sampling.temperature": 0.7,
        "sampling.top_k": 40,
        "chat.think": False,
        "chat.system": "Sois bref.\\ 龍 \x7f\u2028",
        "run.stop": ["END", 'say "FIN"\n'],
        "options.mtp": "auto",
    }
    assert invoke("config", "list", "--json").json == {"path": str(path), "settings": expected}
    assert invoke("config", "get", "chat.think").out == "false\n"
    assert invoke("config", "get", "alias.v2.lite").out == "deepseek-v2-lite-chat:compact\n"
    assert invoke("config", "get", "run.seed", "--json").json == {"key": "run.seed", "value": None}
    unset = invoke("config", "get", "run.seed")
    assert (unset.status, unset.out, unset.err) == (1, "", f"localmoe: run.seed is not set in {path}\n")
    assert 'model = "demo"\n' in invoke("config", "list", "--all").out
    assert "# run.seed" in invoke("config", "list", "--all").out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for name in expected:
        assert invoke("config", "unset", name).status == 0
    assert invoke("config", "list", "--json").json["settings"] == {}
    assert invoke("config", "unset", "model").status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampling.temprature", "1"], "[sampling] has no setting 'temprature'; did you mean temperature?"),
        (["temperature", "1"], "did you mean sampling.temperature, run.temperature or chat.temperature?"),
        (["temp", "0.7"], "no setting 'temp'; did you mean sampling.temperature, run.temperature or chat.temperature?"),
        (["temprature", "0.7"], "did you mean sampling.temperature, "),
        (["options.temp", "1"], "[options] has no setting 'temp'; did you mean sampling.temperature, "),
        (["n", "5"], "did you mean options.max_tokens, run.max_tokens, chat.max_tokens or bench.n?"),
        (["run.n", "5"], "[run] has no setting 'n'; did you mean max_tokens?"),
        (["options.context", "5"], "did you mean ctx?"),
        (["sampling.seed", "1"], "did you mean options.seed, run.seed or chat.seed?"),
        (["top-p", "0.9"], "did you mean sampling.top_p, "),
        (["no-think", "true"], "did you mean options.think, "),
        (["RUN.seed", "1"], "did you mean run.seed?"),
        (["sampling", "1"], "sampling is a table; its settings are sampling.temperature, "),
        (["quantize.recipe", "compact"], "no setting 'quantize.recipe'; localmoe config list --all shows them"),
        (["sampling.temperature", "-1"], "a temperature is at least 0, not -1"),
        (["run.seed", "1", "--jsn"], "No such option: --jsn"),
        (["modle", "demo"], "did you mean model?"),
        (["alias.", "demo"], "no setting 'alias.'"),
        (["run.max_tokens", "many"], "run.max_tokens: a whole number from 1 on is needed, not 'many'"),
        (["run.max_tokens", "1", "2"], "one value is needed, not 2"),
        (["sampling.top_p", "7"], "sampling.top_p: a probability"),
        (["sampling.top_p", "nan"], "is not a number"),
        (["options.device", "cud"], "did you mean cuda?"),
        (["alias.demo", "deepseek-r1"], "is a model's own name already"),
        (["chat.system", "a\udcff"], "chat.system: the value is not valid UTF-8"),
    ],
)
def test_set_refuses_what_the_file_may_not_hold(invoke, arguments, message):
    outcome = invoke("config", "set", *arguments)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert message in outcome.err
    assert not config_file.path().exists()


OWN = """\
# my settings
model = 'demo'   # the small one

[alias] # names
"fast" = "demo:compact" # not "so" # fast
long = \"\"\"
deepseek-v2-lite-chat\"\"\"

# how to answer
[run]
  stop = [
    "END", # one
    "FIN",
  ] # two
max_tokens = 5
# nothing else
"""


def test_the_owners_lines_and_comments_stay(invoke):
    path = write(OWN)
    for arguments in (
        ["model", "fast"],
        ["alias.fast", "demo"],
        ["run.stop", "."],
        ["run.seed", "1"],
        ["chat.seed", "2"],
    ):
        assert invoke("config", "set", *arguments).status == 0
    assert path.read_text() == (
        OWN.replace("model = 'demo' ", 'model = "fast" ')
        .replace('"fast" = "demo:compact"', 'fast = "demo"')
        .replace('[\n    "END", # one\n    "FIN",\n  ]', '["."]')
        .replace("max_tokens = 5\n", "max_tokens = 5\nseed = 1\n")
        + "\n[chat]\nseed = 2\n"
    )
    assert invoke("config", "unset", "alias.long").status == 0
    assert '"""' not in path.read_text()
    assert invoke("config", "get", "model").out == "fast\n"


@pytest.mark.parametrize("before", [[], ["--"]])
def test_a_negative_number_is_a_value(invoke, before):
    assert invoke("config", "set", *before, "sampling.presence_penalty", "-1.5").status == 0
    assert invoke("config", "set", "sampling.frequency_penalty", "-.5", "--json").json["value"] == -0.5
    assert invoke("config", "set", "run.stop", "a", "-1", "b").status == 0
    settings = {"sampling.presence_penalty": -1.5, "sampling.frequency_penalty": -0.5, "run.stop": ["a", "-1", "b"]}
    assert invoke("config", "list", "--json").json["settings"] == settings


def test_get_and_unset_name_the_near_miss(invoke):
    got = invoke("config", "get", "temp")
    assert (got.status, got.out) == (2, "")
    assert "did you mean sampling.temperature, run.temperature or chat.temperature?" in got.err
    unset = invoke("config", "unset", "sampling.temprature")
    assert (unset.status, unset.out) == (1, "")
    assert unset.err.endswith(" is not set in " + str(config_file.path()) + "; did you mean sampling.temperature?\n")
    assert invoke("config", "unset", "run.seed").err.endswith("config.toml\n")  # known, and not set


def test_a_setting_nobody_knows_can_be_unset(invoke):
    path = write("# mine\n[run]\nmax_token = 5\nseed = 1\n")
    assert invoke("config", "set", "run.seed", "2").status == 2  # what is wrong is said first
    assert invoke("config", "unset", "run.max_token").status == 0
    assert path.read_text() == "# mine\n[run]\nseed = 1\n"


@pytest.mark.parametrize("text", ["run = { seed = 1 }\n", "run.seed = 1\n", "[run]\nsystem = '''\nseed = 1\n'''\n"])
def test_what_cannot_be_edited_safely_is_left_alone(invoke, text):
    path = write(text)
    outcome = invoke("config", "set", "run.seed", "2")
    if outcome.status == 0:
        assert tomllib.loads(path.read_text())["run"] == tomllib.loads(text)["run"] | {"seed": 2}
    else:
        assert "only a person can edit" in outcome.err
        assert path.read_text() == text


def test_line_ends_and_a_link_stay(invoke, tmp_path):
    kept = tmp_path / "dotfiles.toml"
    kept.write_bytes(b"# mine\r\n[run]\r\nseed = 1\r\n")
    kept.chmod(0o640)
    config_file.path().parent.mkdir(parents=True)
    config_file.path().symlink_to(kept)
    assert invoke("config", "set", "run.seed", "2").status == 0
    assert kept.read_bytes() == b"# mine\r\n[run]\r\nseed = 2\r\n"
    assert config_file.path().is_symlink()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    assert [path.name for path in config_file.directory().iterdir()] == ["config.toml"]


def test_an_unwritable_place_is_one_line(invoke, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    outcome = invoke("config", "set", "model", "demo")
    assert outcome.status != 0
    assert outcome.err.count("\n") == 1
    assert "config.toml" in outcome.err


def test_edit_checks_what_was_written(invoke, tmp_path, monkeypatch):
    editor = tmp_path / "an editor"
    editor.write_text("#!/bin/sh\necho 'colour = 1' >> \"$2\"\n")
    editor.chmod(0o755)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"'{editor}' -w")
    outcome = invoke("config", "edit")
    assert outcome.status == 2
    assert "'colour' is not a setting" in outcome.err
    monkeypatch.setenv("EDITOR", "/nowhere/vi")
    assert "cannot be started" in invoke("config", "edit").err
    monkeypatch.delenv("EDITOR")
    assert "neither VISUAL nor EDITOR" in invoke("config", "edit").err


def test_edits_of_random_files_change_one_setting_or_nothing():
    """Files made of awkward pieces; an edit that is not refused reads back as exactly that edit."""
    pieces = [
        "a = 1\n", "b = [1, # x\n 2]\n", 'c = """\n[t]\nd = 1\n"""\n', "[t]\n", "[u] # [t]\n", "  [ 't' ]\n",
        "d = '#'\n", "# d = 2\n", "\n", "t.d = 3\n", '"d" = 4 # d\n', "[[v]]\n", "d = [\n [\n1],\n]\n",
        "e = { d = 1 }\n",
    ]  # fmt: skip
    source = random.Random(1)
    edited = 0
    for _ in range(3000):
        text = "".join(source.choices(pieces, k=source.randrange(6)))
        try:
            old = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            continue
        table = source.choice([None, "t", "u"])
        inner = old if table is None else old.get(table, {})
        if not isinstance(inner, dict):
            continue
        try:
            new = tomllib.loads(with_setting(text, table, "d", "new"))
        except UsageError:
            continue
        edited += 1
        expected = tomllib.loads(text)
        (expected if table is None else expected.setdefault(table, {}))["d"] = "new"
        assert new == expected
        if "d" in inner:
            less = tomllib.loads(without_setting(text, table, "d"))
            (expected if table is None else expected[table]).pop("d")
            assert less == expected
    assert edited > 300


def test_literals_read_back():
    source = random.Random(2)
    for _ in range(500):
        text = "".join(source.choice(string.printable + "\x7f\x1b\x00é龍\u2028") for _ in range(12))
        assert tomllib.loads(f"x = {literal(text)}")["x"] == text
    for value in (0.1, 1e-7, 1e22, -0.5, 3, True, ["a", '"']):
        assert tomllib.loads(f"x = {literal(value)}")["x"] == value


@pytest.mark.parametrize(
    ("word", "near"),
    [("tepm", "temp"), ("temper", "temperature"), ("MODEL", "model"), ("xyz", None), ("", None)],
)
def test_near_misses(word, near):
    known = ["temp", "model"] if near == "temp" else ["temperature", "model", "stop"]
    assert near_miss(word, known) == near
