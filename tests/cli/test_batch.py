"""`run --jsonl`: many prompts, the answers in order."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from localmoe.cli import prompt_template


def lines(*values: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def records(outcome) -> list[dict]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def asked(engine) -> list[list[str]]:
    return [[message["content"] for message in call["prompt"]] for call in engine.calls]


def test_texts_and_objects_in_order(invoke, engine):
    given = lines("one two", {"id": "b", "prompt": "three", "system": "S", "max_tokens": 2}, {"id": 7, "prompt": "x"})
    outcome = invoke("run", "demo", "--jsonl", "-", "--seed", "3", stdin=given)
    assert (outcome.status, outcome.err) == (0, "")
    found = records(outcome)
    assert found[0] == {
        "line": 1,
        "text": "Once upon a time.",
        "thinking": None,
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "reused_tokens": 0,
        "completion_tokens": 4,
        "prefill_seconds": 0.25,
        "decode_seconds": 0.5,
        "decode_tokens_per_second": 6.0,
        "speculation": None,
    }
    assert [(each["line"], each.get("id"), each["text"]) for each in found[1:]] == [
        (2, "b", "Once upon"),
        (3, 7, "Once upon a time."),
    ]
    assert asked(engine) == [["one two"], ["S", "three"], ["x"]]
    assert all(call["reuse_prefix"] and call["seed"] == 3 for call in engine.calls)


def test_a_line_has_settings_of_its_own(invoke, engine):
    engine.template = "switch"
    own = {"temperature": 0.5, "top_k": 3, "seed": 9, "stop": "END", "think": True, "prompt": "x"}
    invoke("run", "demo", "--jsonl", "-", "--temp", "0.1", "--top-p", "0.9", "--stop", "A", stdin=lines(own, "y"))
    first, second = engine.calls
    assert (first["temperature"], first["top_p"], first["top_k"], first["seed"]) == (0.5, 0.9, 3, 9)
    assert (first["stop"], first["thinking"]) == (("END",), True)
    assert (second["temperature"], second["top_k"], second["seed"], second["stop"]) == (0.1, 0, None, ("A",))
    assert second["thinking"] is None


def test_messages(invoke, engine):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert invoke("run", "demo", "--jsonl", "-", stdin=lines({"messages": talk})).status == 0
    assert engine.calls[0]["prompt"] == talk


def test_a_prompt_and_files_stand_above_each_line(invoke, engine, tmp_path: Path):
    notes = tmp_path / "notes"
    notes.write_text("N")
    outcome = invoke("run", "demo", "Sum up", "-f", str(notes), "--jsonl", "-", stdin=lines("a", {"prompt": "b"}))
    assert outcome.status == 0
    assert asked(engine) == [[f"Sum up\n{notes}:\n```\nN\n```\n{text}"] for text in "ab"]


def test_a_template_is_filled_by_each_line(invoke, engine):
    path = prompt_template.path_of("t")
    path.parent.mkdir(parents=True)
    path.write_text('prompt = "{a} {b}: {input}"\nsystem = "S {a}"\n[params]\nb = "B"\n')
    given = lines({"prompt": "x", "params": {"a": "1"}}, "y", {"prompt": "z", "params": {"c": "1"}, "system": "T"})
    outcome = invoke("run", "demo", "--template", "t", "--param", "b=C", "--jsonl", "-", stdin=given)
    assert asked(engine) == [["S 1", "1 C: x"]]
    assert "needs --param a=" in records(outcome)[1]["error"]["message"]
    assert "has no {c}" in records(outcome)[2]["error"]["message"]


def test_raw_continues_texts(invoke, engine):
    assert invoke("run", "demo", "--raw", "--jsonl", "-", stdin=lines("Once", "")).status == 0
    assert [call["prompt"] for call in engine.calls] == ["Once", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"\xff", "line 2 is not valid UTF-8 at byte 0"),
        (b'"\\ud800"', "line 2: half a character"),
        (b"7", "line 2: a text or an object is needed"),
        (b"null", "line 2: a text or an object is needed"),
        (b"{}", "line 2: no prompt"),
        (b'{"prompt": 7}', "line 2: prompt: a text is needed"),
        (b'{"prompt": ""}', "line 2: the prompt is empty"),
        (b'{"promt": "x"}', "line 2: no key 'promt'; did you mean prompt?"),
        (b'{"prompt": "x", "temperature": "hot"}', "line 2: temperature: 'hot' is not a number"),
        (b'{"prompt": "x", "temperature": NaN}', "line 2: temperature: nan is not a number"),
        (b'{"prompt": "x", "max_tokens": 0}', "line 2: max_tokens: a whole number from 1 on"),
        (b'{"prompt": "x", "stop": ""}', "line 2: stop"),
        (b'{"prompt": "x", "think": true}', "has no switch for thinking"),
        (b'{"prompt": "x", "system": 1}', "line 2: system"),
        (b'{"prompt": "x", "params": {"a": "b"}}', "line 2: params fill in a template"),
        (b'{"prompt": "x", "params": 1}', "line 2: params: an object of texts"),
        (b'{"prompt": "x", "messages": []}', "line 2: messages go without"),
        (b'{"messages": []}', "line 2: messages: a list"),
        (b'{"messages": [{"role": "user"}]}', "line 2: messages: each has a role"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "line 2: messages: each has a role"),
        (json.dumps("word " * 99).encode(), "the prompt has 99 tokens"),
    ],
)
def test_a_bad_line_has_an_error_and_the_others_go_on(invoke, engine, line, message):
    outcome = invoke("run", "demo", "--jsonl", "-", stdin=b'"good"\n' + line + b'\n\n{"prompt": "good", "id": 3}')
    assert outcome.status == 1
    assert outcome.err == "localmoe: 1 of 3 lines failed; their objects have an error\n"
    first, second, third = records(outcome)
    assert (first["line"], second["line"], third["line"], third["id"]) == (1, 2, 4, 3)
    assert first["text"] == third["text"] == "Once upon a time."
    assert message in second["error"]["message"]
    assert second.keys() == {"line", "error"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jsonl", "/nowhere/x"], "--jsonl: /nowhere/x: cannot be read: No such file"),
        (["--jsonl", "/"], "--jsonl: /: cannot be read: Is a directory"),
        (["--jsonl", "-"], "nothing is piped in"),
        (["--jsonl", "-", "--json"], "--jsonl: each answer is a JSON object"),
        (["--jsonl", "-", "--explain-speed"], "--jsonl asks for many"),
        (["--jsonl", "-", "--think-to", "x"], "--jsonl: each answer is a JSON object"),
    ],
)
def test_refusals(invoke, engine, arguments, message):
    outcome = invoke("run", "demo", *arguments, terminals=("stdin",))
    assert outcome.status in (1, 2)
    assert message in outcome.err
    assert not engine.calls


def test_logprobs(invoke, engine):
    engine.tokenizer = type("Tokens", (), {"decode": staticmethod(lambda ids: "w")})
    outcome = invoke("run", "demo", "--jsonl", "-", "--logprobs", "1", stdin=lines("x"))
    assert len(records(outcome)[0]["logprobs"]) == 4


def test_progress_is_for_a_terminal_and_not_in_the_answers(invoke, engine, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(lines("a", "b", "c"))
    watched = invoke("run", "demo", "--jsonl", str(file), terminals=("stderr",))
    assert [record["line"] for record in records(watched)] == [1, 2, 3]
    assert "3/3" in watched.err
    assert "3 answers · 12 tokens, 6.0 tokens/s" in watched.err
    assert invoke("run", "demo", "--jsonl", str(file)).err == ""


def test_answers_are_flushed_one_by_one_as_prompts_come(program):
    process = program.start("run", "demo", "--jsonl", "-", stdin=-1, stdout=-1, stderr=-1)
    for number in (1, 2):  # each prompt is written only when the one before has been answered
        process.stdin.write(lines(f"prompt {number}"))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["line"] == number
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (0, b"", b"")


def test_ctrl_c_keeps_what_was_done(program):
    program.environment |= {"FAKE_ANSWER": "word " * 40, "FAKE_DELAY": "0.1"}
    process = program.start("run", "demo", "--jsonl", "-", stdin=-1, stdout=-1, stderr=-1)
    process.stdin.write(lines({"prompt": "a", "max_tokens": 1}, "b", "c"))
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["finish_reason"] == "length"
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    found = [json.loads(line) for line in rest.splitlines()]
    assert [each["finish_reason"] for each in found] in (["interrupted"], [])


def test_ctrl_c_while_waiting_for_a_line(program):
    process = program.start("run", "demo", "--jsonl", "-", stdin=-1, stdout=-1, stderr=-1)
    process.stdin.write(lines("a"))
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["line"] == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read() == b"localmoe: interrupted\n"
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


def test_a_reader_that_leaves_and_a_full_disk(program, tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(lines("a") * 20_000)
    process = program.start("run", "demo", "--jsonl", str(file), stdin=subprocess.DEVNULL, stdout=-1, stderr=-1)
    assert process.stdout.read(30)
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    with Path("/dev/full").open("wb") as full:
        arguments = ("run", "demo", "--jsonl", str(file))
        outcome = program.run(*arguments, capture_output=False, stdin=subprocess.DEVNULL, stdout=full, stderr=-1)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(b"localmoe: standard output cannot be written")
