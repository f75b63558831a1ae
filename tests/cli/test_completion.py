"""Completion: what the program answers, and what the shells make of it when a person presses Tab."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localmoe import sessions
from localmoe.cli import config_file, prompt_template
from localmoe.cli.app import COMMANDS
from localmoe.cli.completion import SHELLS

BREAKS = " \t\n\"'><=;|&(:"


@pytest.fixture(autouse=True)
def surroundings(home: Path) -> None:
    """An alias, a template, and a model of the user's own with a repository's name."""
    own = home / "models" / "maker--Model" / "compact"
    own.mkdir(parents=True)
    (own / "localmoe.json").write_text("{}")
    template = prompt_template.path_of("review")
    template.parent.mkdir(parents=True)
    template.write_text('prompt = "{input}"')
    session = sessions.path_of("dragons")
    session.parent.mkdir()
    session.touch()  # damaged, but to be named for rm
    config_file.path().write_text('[alias]\nfast = "demo:compact"\n')


def candidates(invoke, *words: str) -> list[str]:
    outcome = invoke("__complete", "fish", *words)
    assert (outcome.status, outcome.err) == (0, "")
    first, *lines = outcome.out.splitlines()
    return [line.partition("\t")[0] for line in lines] if first == "words" else [first]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["be"], {"bench"}),
        ([""], set(COMMANDS)),
        (["-"], {"--help", "--version", "--json"}),
        (["run", "fa"], {"fast"}),
        (["run", "demo:b"], {"demo:balanced"}),
        (["show", "maker/"], {"maker/Model", "maker/Model:compact"}),
        (["pull", "deepseek-r"], {"deepseek-r1", "deepseek-r1-0528"}),
        (["run", "./"], {"files"}),
        (["run", "demo", "some text", ""], set()),
        (["run", "demo", "--dev"], {"--device"}),
        (["run", "demo", "--no-t"], {"--no-think"}),
        (["run", "demo", "--device", ""], {"auto", "cpu", "cuda"}),
        (["run", "demo", "--device=cp"], {"--device=cpu"}),
        (["run", "demo", "--kernels", "avx"], {"avx2", "avxvnni", "avx512"}),
        (["run", "demo", "--cache-dtype", "b"], {"bf16"}),
        (["run", "demo", "-f", ""], {"files"}),
        (["run", "demo", "--think-to", ""], {"files"}),
        (["run", "demo", "--jsonl", ""], {"files"}),
        (["run", "demo", "--template", ""], {"review"}),
        (["run", "demo", "--temp", ""], set()),
        (["run", "--temp", "1", "dem"], {"demo"}),
        (["run", "--raw", "fas"], {"fast"}),
        (["run", "--", "fas"], {"fast"}),
        (["run", "demo", "--", "--dev"], set()),
        (["run", "demo", "x", "y", ""], set()),
        (["eval", "demo", "--reference", "fas"], {"fast"}),
        (["eval", "demo", "--text", ""], {"files"}),
        (["quantize", "demo", "--recipe", "e"], {"experts-only"}),
        (["quantize", "demo", "--method", ""], {"rtn", "gptq", "auto"}),
        (["quantize", "demo", "--calibrate", ""], {"files"}),
        (["quantize", "demo", "-o", ""], {"files"}),
        (["list", ""], set()),
        (["list", "--j"], {"--json"}),
        (["config", "un"], {"unset"}),
        (["config", "set", "alias."], {"alias.fast"}),
        (["config", "get", "sampling.te"], {"sampling.temperature"}),
        (["config", "set", "options.device", "c"], {"cpu", "cuda"}),
        (["config", "set", "model", "fas"], {"fast"}),
        (["config", "set", "chat.think", ""], {"true", "false"}),
        (["config", "set", "nothing.known", ""], set()),
        (["templates", "show", "r"], {"review"}),
        (["sessions", ""], {"list", "show", "rm"}),
        (["sessions", "show", ""], {"dragons"}),
        (["sessions", "list", ""], set()),
        (["run", "demo", "--session", "d"], {"dragons"}),
        (["run", "demo:c"], {"demo:compact"}),
        (["completion", ""], set(SHELLS)),
        (["nonsense", ""], set()),
        (["config", "nonsense", ""], set()),
    ],
)
def test_candidates(invoke, words, expected):
    found = candidates(invoke, *words)
    assert len(found) == len(set(found))
    plain = {each for each in found if ":" not in each or ":" in words[-1] or each.startswith("maker")}
    assert plain == expected


def test_candidates_of_a_command_are_all_its_options(invoke):
    offered = set(candidates(invoke, "bench", "demo", "--"))
    usage = invoke("bench", "--help").out
    assert offered == set(
        re.findall(r"(?<=[ ,])--[a-z-]+(?= )", usage.partition("Options:")[2].partition("Examples")[0])
    )


def test_bash_gets_what_is_behind_the_colon(invoke):
    assert invoke("__complete", "bash", BREAKS, "run", "demo:ba").out == "words\nbalanced\n"
    assert invoke("__complete", "bash", " ", "run", "demo:ba").out == "words\ndemo:balanced\n"
    assert invoke("__complete", "bash", BREAKS, "run", "x", "--device=c").out == "words\ncpu\ncuda\n"


@pytest.mark.parametrize(
    "arguments", [[], ["bash"], ["bash", BREAKS], ["fish"], ["zsh", "run"], ["fish", "run", "\udcff"]]
)
def test_odd_questions_are_no_failure(invoke, arguments):
    outcome = invoke("__complete", *arguments)
    assert (outcome.status, outcome.err) == (0, "")


def test_a_broken_config_file_costs_only_its_aliases(invoke):
    config_file.path().write_text("][")
    assert "demo:balanced" in candidates(invoke, "run", "demo:")


def test_names_are_completed_without_heavy_imports(program):
    code = (
        "import sys; from localmoe.cli.app import main; status = main(['__complete', 'fish', 'run', 'de']);"
        "heavy = [m for m in ('torch', 'numpy', 'rich', 'prompt_toolkit', 'huggingface_hub', 'pydantic')"
        " if m in sys.modules]; print('HEAVY', heavy); sys.exit(status)"
    )
    program.command = (sys.executable, "-c", code)
    assert "HEAVY []" in program.run(text=True).stdout


def test_an_unknown_shell(invoke):
    outcome = invoke("completion", "fsh")
    assert (outcome.status, outcome.out) == (2, "")
    assert "did you mean fish?" in outcome.err
    assert invoke("completion", "zsh", "--json").json["script"].startswith("#compdef localmoe\n")


class Shell:
    """A shell at a terminal, with `localmoe` on its path and its completion script loaded."""

    def __init__(self, tmp_path: Path, *command: str, setup: str) -> None:
        programs = tmp_path / "bin"
        programs.mkdir()
        (programs / "localmoe").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m localmoe "$@"\n')
        (programs / "localmoe").chmod(0o755)
        (tmp_path / "letter to you.txt").write_text("")
        self._master, slave = pty.openpty()
        environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ ", "HOME": str(tmp_path),
            "INPUTRC": "/dev/null",
        }  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = ""
        self.type(f"{setup}; echo re''ady\n")
        self.expect("ready")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, pattern: str) -> None:
        deadline = time.monotonic() + 30
        while re.search(pattern, self.seen) is None:
            assert select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            self.seen += os.read(self._master, 65536).decode(errors="replace")

    def completed(self, keys: str, pattern: str) -> None:
        """Press Tab after `keys`, expect what appears, and empty the line."""
        self.seen = ""
        self.type(keys + "\t")
        self.expect(pattern)
        self.type("\x15")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self._master)


def press_tab(shell: Shell) -> None:
    shell.completed("localmoe ben", r"localmoe bench ")
    shell.completed("localmoe run demo:ba", r"run demo:balanced")
    shell.completed("localmoe show maker/M", r"show maker/Model")
    shell.completed("localmoe run fas", r"run fast")
    shell.completed("localmoe bench demo --rep", r"--repeats ")
    shell.completed("localmoe run demo -f lett", r"-f letter\\ to\\ you.txt")
    shell.completed("localmoe run demo 'two words' --templ", r"--template ")
    shell.completed("localmoe config set options.cache_d", r"options.cache_dtype")


def test_bash(tmp_path):
    shell = Shell(
        tmp_path, "bash", "--norc", "--noprofile", "-i",
        setup='bind "set bell-style none"; eval "$(localmoe completion bash)"',
    )  # fmt: skip
    try:
        press_tab(shell)
        shell.completed("localmoe bench demo --device=cu", r"--device=cuda")
    finally:
        shell.close()


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh(tmp_path):
    shell = Shell(
        tmp_path, "zsh", "-f", "-i",
        setup='unsetopt prompt_cr; autoload -Uz compinit; compinit -u; eval "$(localmoe completion zsh)"',
    )  # fmt: skip
    try:
        press_tab(shell)
    finally:
        shell.close()


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish(tmp_path, program):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "localmoe").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m localmoe "$@"\n')
    (programs / "localmoe").chmod(0o755)
    (tmp_path / "letter to you.txt").write_text("")
    questions = ("ben", "run demo:ba", "show maker/M", "run demo -f lett", "config set options.cache_d")
    code = "localmoe completion fish | source\n" + "".join(f"complete -C 'localmoe {q}'\n" for q in questions)
    environment = program.environment | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    outcome = subprocess.run(
        ["fish", "--no-config", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    found = [line.partition("\t")[0] for line in outcome.stdout.splitlines()]
    assert found == [
        "bench", "demo:balanced", "maker/Model", "maker/Model:compact", "letter to you.txt", "options.cache_dtype",
    ], outcome.stderr  # fmt: skip
