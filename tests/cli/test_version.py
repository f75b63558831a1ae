"""`--version`: the commit asked of git in a checkout, read from what the build wrote elsewhere, and never a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from localmoe.cli import version


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    made = tmp_path / "checkout" / "localmoe"
    made.mkdir(parents=True)
    (made / "file").write_text("1")
    return made


def test_a_checkout_asks_git(package, monkeypatch):
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "one")
    (package / "commit").write_text("0123456789ab\n")  # of an older build
    full = git(package.parent, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert version.commit_of(package) == (full[:12], False)
    (package / "file").write_text("2")
    assert version.commit_of(package) == (full[:12], True)
    monkeypatch.setenv("PATH", "/nowhere")
    assert version.commit_of(package) == (None, None)


def test_a_checkout_without_a_commit_or_a_broken_one(package):
    (package.parent / ".git").write_text("gitdir: /nowhere")
    assert version.commit_of(package) == (None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0123456789ab\n", ("0123456789ab", False)),
        ("0123456789ab-dirty\n", ("0123456789ab", True)),
        ("\n", (None, None)),
        ("\x1b[31m", (None, None)),
        (None, (None, None)),
    ],
)
def test_elsewhere_the_build_wrote_it_down(package, text, expected):
    if text is not None:
        (package / "commit").write_text(text)
    assert version.commit_of(package) == expected


def test_what_cannot_be_found_out_is_left_out(monkeypatch):
    monkeypatch.setattr(version, "commit_of", lambda _: (None, None))
    monkeypatch.setitem(sys.modules, "localmoe.kernels._cpu", None)  # importing it fails
    monkeypatch.delattr("localmoe.kernels._cpu", raising=False)
    facts = version.describe()
    assert (facts["commit"], facts["kernels"], facts["tiers"]) == (None, None, [])
    assert version.as_text(facts).startswith(f"localmoe {facts['version']}\nkernels  not built")


def test_json_belongs_to_the_version(invoke):
    assert invoke("--version", "--json").json["version"].startswith("0.")
    outcome = invoke("--json")
    assert (outcome.status, outcome.json["error"]["kind"]) == (2, "usage")
    assert invoke("--json", "list").status == 2
