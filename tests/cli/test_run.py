"""`run` with the fake engine: what reaches the model, what reaches the user."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from localmoe import store
from localmoe.cli import quantize as quantize_command

FakeSpeculation = sys.modules["fake_localmoe"].FakeSpeculation  # conftest.py puts it there


def question(engine) -> str:
    return engine.calls[0]["prompt"][-1]["content"]


def test_the_answer_alone_is_on_stdout(invoke, engine):
    outcome = invoke("run", "demo", "Tell me")
    assert (outcome.status, outcome.out, outcome.err) == (0, "Once upon a time.\n", "")
    assert engine.closed


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["Hi"], b"", "Hi"),
        (["Hi"], b"there\n", "Hi\nthere"),
        (["Hi"], b"there\n\n", "Hi\nthere\n"),
        (["Hi"], b"\n", "Hi\n"),
        ([], b"only stdin", "only stdin"),
        (["Hi"], b"a\0b", "Hi\na\0b"),
        (["Hi"], "龍 🐉\n".encode(), "Hi\n龍 🐉"),
    ],
)
def test_prompt_then_a_newline_then_stdin_less_one_newline(invoke, engine, arguments, stdin, expected):
    assert invoke("run", "demo", *arguments, stdin=stdin).status == 0
    assert question(engine) == expected


def test_a_terminal_at_stdin_is_not_read(invoke, engine):
    assert invoke("run", "demo", "Hi", stdin=b"typed ahead", terminals=("stdin",)).status == 0
    assert question(engine) == "Hi"


def test_files_are_named_in_the_prompt(invoke, engine, tmp_path: Path):
    first, second = tmp_path / "a.txt", tmp_path / "b.md"
    first.write_text("alpha\n")
    second.write_text("```\nbeta\n```\n")
    assert invoke("run", "demo", "Compare", "-f", str(first), "-f", str(second), stdin=b"end").status == 0
    assert question(engine) == (f"Compare\n{first}:\n```\nalpha\n```\n{second}:\n````\n```\nbeta\n```\n````\nend")


@pytest.mark.parametrize(
    ("arguments", "stdin", "terminals", "status", "message"),
    [
        ([], b"", ("stdin",), 2, "nothing to ask"),
        ([], b"", (), 1, "the prompt is empty"),
        ([""], b"", (), 1, "the prompt is empty"),
        (["Hi"], b"abc\xffdef", (), 1, "standard input is not valid UTF-8 at byte 3 (0xff)"),
        (["a\udcffb"], b"", (), 1, "PROMPT is not valid UTF-8 at byte 1"),
        (["Hi", "-f", "/nowhere/x.txt"], b"", (), 1, "/nowhere/x.txt: cannot be read"),
        (["Hi", "--raw", "--system", "s"], b"", (), 2, "--raw goes without"),
        (["Hi", "--stop", ""], b"", (), 2, "--stop"),
        (["Hi", "--temp", "-1"], b"", (), 2, "--temp: a temperature is at least 0"),
        (["Hi", "--temp", "nan"], b"", (), 2, "--temp: nan is not a number"),
        (["Hi", "--top-p", "0"], b"", (), 2, "--top-p"),
        (["Hi", "--top-k", "-1"], b"", (), 2, "--top-k"),
        (["Hi", "--min-p", "2"], b"", (), 2, "--min-p"),
        (["Hi", "--repetition-penalty", "0"], b"", (), 2, "--repetition-penalty"),
        (["Hi", "--presence-penalty", "101"], b"", (), 2, "--presence-penalty"),
        (["Hi", "--frequency-penalty", "nan"], b"", (), 2, "--frequency-penalty"),
        (["Hi", "--logit-bias", "fox=1"], b"", (), 2, "--logit-bias: 'fox=1' is not ID=B"),
        (["Hi", "--logit-bias", "5=inf"], b"", (), 2, "--logit-bias"),
        (["Hi", "--mtp", "8"], b"", (), 2, "--mtp: '8' is neither auto nor a number from 0 to 7"),
        (["Hi", "--logprobs", "2"], b"", (), 2, "add --json"),
        (["Hi", "-n", "0"], b"", (), 2, "-n"),
        (["Hi", "-n", "many"], b"", (), 2, "valid integer"),
        (["Hi", "--device", "tpu"], b"", (), 2, "--device: 'tpu' is not one of auto, cpu, cuda"),
        (["Hi", "--kernels", "sse"], b"", (), 2, "--kernels"),
        (["Hi", "--vram", "12"], b"", (), 2, "--vram: '12' is not a size; write it as 12GiB or 12GB"),
        (["Hi", "--ram", "12 GiB"], b"", (), 2, "--ram"),
        (["Hi", "--tepm", "1"], b"", (), 2, "No such option: --tepm"),
        (["Hi", "--think"], b"", (), 2, "--think: this model's chat template has no switch"),
    ],
)
def test_refusals(invoke, engine, arguments, stdin, terminals, status, message):
    outcome = invoke("run", "demo", *arguments, stdin=stdin, terminals=terminals)
    assert outcome.status == status
    assert outcome.out == ""
    assert outcome.err.startswith("localmoe: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not engine.calls


def test_every_flag_reaches_the_engine(invoke, engine):
    outcome = invoke(
        *("run", "demo", "Hi", "-n", "3", "--temp", "0.5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.05"),
        *("--seed", "7", "--stop", "END", "--stop", "FIN", "--system", "Be brief", "--device", "cpu"),
        *("--kernels", "portable", "--threads", "2", "--vram", "1.5GiB", "--ram", "2GB", "--ctx", "32"),
        *("--repetition-penalty", "1.1", "--presence-penalty", "0.5", "--frequency-penalty", "-0.25"),
        *("--logit-bias", "5=2.5", "--logit-bias", "7=-inf", "--mtp", "auto", "--deterministic"),
    )
    assert outcome.out == "Once upon a\n"
    call = engine.calls[0]
    assert call.pop("prompt") == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert call == {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "logit_bias": {5: 2.5, 7: float("-inf")},
        "top_logprobs": 0,
        "seed": 7,
        "stop": ("END", "FIN"),
        "thinking": None,
        "reuse_prefix": False,
    }
    machine = engine.machine
    assert machine.mtp is None
    assert (machine.device, machine.kernels, machine.threads, machine.context) == ("cpu", "portable", 2, 32)
    assert (machine.vram, machine.ram) == (3 * 2**29, 2 * 10**9)


def test_raw_continues_text_byte_for_byte(invoke, engine):
    outcome = invoke("run", "demo", "Once", "--raw")
    assert outcome.out == "Once upon a time."
    assert engine.calls[0]["prompt"] == "Once"


def test_raw_may_begin_from_nothing(invoke, engine):
    assert invoke("run", "demo", "", "--raw").status == 0
    assert engine.calls[0]["prompt"] == ""


def test_a_model_without_a_template_says_raw(invoke, engine):
    engine.template = "none"
    outcome = invoke("run", "demo", "Hi")
    assert outcome.status == 1
    assert "--raw" in outcome.err


def test_json(invoke, engine):
    outcome = invoke("run", "demo", "Tell me a story", "--json")
    assert outcome.status == 0
    assert outcome.err == ""
    assert outcome.json == {
        "model": "demo:balanced",
        "text": "Once upon a time.",
        "thinking": None,
        "finish_reason": "stop",
        "prompt_tokens": 4,
        "reused_tokens": 0,
        "completion_tokens": 4,
        "prefill_seconds": 0.25,
        "decode_seconds": 0.5,
        "decode_tokens_per_second": 6.0,
        "speculation": None,
    }


def test_what_guessing_did_is_said(invoke, engine):
    engine.speculation = FakeSpeculation()
    assert invoke("run", "demo", "Hi", "--mtp", "1", "--json").json["speculation"] == {
        "drafter": "mtp",
        "drafts": 1,
        "passes": 9,
        "drafted_tokens": 8,
        "accepted_tokens": 6,
        "acceptance_rate": 0.75,
    }
    assert "mtp: 6 of 8 guesses right (75%), 1 at a time" in invoke("run", "demo", "Hi", terminals=("stderr",)).err
    engine.speculation = FakeSpeculation("lookup", drafted_tokens=0, accepted_tokens=0, acceptance_rate=None)
    assert invoke("run", "demo", "Hi", "--json").json["speculation"]["acceptance_rate"] is None
    assert "lookup: nothing guessed" in invoke("run", "demo", "Hi", terminals=("stderr",)).err


@pytest.mark.parametrize(
    ("arguments", "status", "kind"),
    [
        (["run", "demo", "Hi", "--json", "--temp", "-1"], 2, "usage"),
        (["run", "demo", "--json", "--nonsense"], 2, "usage"),
        (["run", "demo", "word " * 99, "--json"], 1, "context"),
        (["run", "deepseek-r1", "Hi", "--json"], 1, "model_not_found"),
        (["run", "demo", "--json"], 1, "input"),
        (["show", "nothing-like-it", "--json"], 1, "model_not_found"),
    ],
)
def test_json_failures(invoke, engine, arguments, status, kind):
    outcome = invoke(*arguments)
    assert outcome.status == status
    assert outcome.json["error"]["kind"] == kind
    assert outcome.err == f"localmoe: {outcome.json['error']['message']}\n"


def test_thinking_is_dropped_or_sent_to_stderr(invoke, engine):
    engine.template = "think"
    engine.answer = "I wonder. </think>\n\nA dragon."
    assert invoke("run", "demo", "Hi").out == "A dragon.\n"
    shown = invoke("run", "demo", "Hi", "--show-thinking")
    assert (shown.out, shown.err) == ("A dragon.\n", "I wonder. \n")
    recorded = invoke("run", "demo", "Hi", "--json").json
    assert (recorded["text"], recorded["thinking"]) == ("A dragon.", "I wonder. ")


def test_thinking_can_be_switched_where_the_template_can(invoke, engine):
    engine.template = "switch"
    engine.answer = "Hm </think>Yes."
    assert invoke("run", "demo", "Hi", "--think").out == "Yes.\n"
    assert invoke("run", "demo", "Hi", "--no-think").out == "Hm </think>Yes.\n"
    assert [call["thinking"] for call in engine.calls] == [True, False]


def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_them_all(invoke, engine):
    engine.answer = "a\x1b [31mred\x07 \u202eevil \x9b2J b"
    assert invoke("run", "demo", "Hi").out == engine.answer + "\n"
    assert invoke("run", "demo", "Hi", terminals=("stdout",)).out == "a [31mred evil 2J b\n"


def test_statistics_go_to_a_terminal_only(invoke, engine):
    watched = invoke("run", "demo", "Tell me", terminals=("stderr",))
    assert watched.out == "Once upon a time.\n"
    assert "4 tokens, 6.0 tokens/s · prompt 2 tokens, 0.25 s" in watched.err
    assert "loading demo:balanced" in watched.err


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_no_colour_on_a_dumb_terminal_or_with_no_color(invoke, engine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    outcome = invoke("run", "demo", "Hi", terminals=("stdout", "stderr"))
    assert outcome.err.startswith("4 tokens")
    assert "\x1b" not in outcome.out + outcome.err


def test_a_prompt_beyond_the_context_is_refused(invoke, engine):
    outcome = invoke("run", "demo", "word " * 100)
    assert outcome.status == 1
    assert outcome.err == "localmoe: the prompt has 100 tokens and the context holds 64\n"


def test_a_model_that_is_not_here_says_what_to_type(invoke, engine):
    outcome = invoke("run", "deepseek-r1", "Hi")
    assert outcome.status == 1
    assert "localmoe pull deepseek-r1" in outcome.err
    assert "localmoe quantize deepseek-r1" in outcome.err


@pytest.mark.parametrize(("model", "recipe"), [("demo", "balanced"), ("demo:compact", "compact")])
def test_a_source_that_is_here_is_quantized_first(invoke, engine, home, monkeypatch, model, recipe):
    store.remove(store.parse_ref("demo"), all=True)
    made = []

    def make_artifact(source: Path, output: Path, recipe: str) -> None:
        made.append((source, recipe))
        output.mkdir(parents=True)
        (output / "config.json").write_text("{}")
        (output / "localmoe.json").write_text(json.dumps({"format": 1, "recipe": recipe}))

    monkeypatch.setattr(quantize_command, "make_artifact", make_artifact)
    for _ in range(2):
        outcome = invoke("run", model, "Hi")
        assert (outcome.status, outcome.out) == (0, "Once upon a time.\n")
    assert made == [(store.find_source("demo"), recipe)]
    assert engine.path == home / "models" / "demo" / recipe


def test_source_runs_as_it_is(invoke, engine):
    assert invoke("run", "demo:source", "Hi", "--json").json["model"] == "demo:source"
    assert engine.path == store.find_source("demo")


def test_logprobs_are_a_part_of_the_object(invoke, engine):
    engine.tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    found = invoke("run", "demo", "Hi", "--json", "--logprobs", "3").json
    assert engine.calls[0]["top_logprobs"] == 3
    assert found["logprobs"][0] == {"id": 1, "text": "<1>", "logprob": -0.5, "top": []}
    assert len(found["logprobs"]) == found["completion_tokens"]


def test_what_an_answer_has_to_be_reaches_the_engine(invoke, engine, tmp_path: Path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert invoke("run", "demo", "Hi", "--schema", str(schema)).status == 0
    assert invoke("run", "demo", "Hi", "--grammar", str(schema)).status == 0
    assert invoke("run", "demo", "Hi", "--choice", "yes", "--choice", "no").status == 0
    assert [call.get("schema") for call in engine.calls] == ['{"type": "object"}', None, None]
    assert [call.get("grammar") for call in engine.calls] == [None, '{"type": "object"}', None]
    assert [call.get("choice") for call in engine.calls] == [None, None, ["yes", "no"]]
    for arguments, message in (
        (("--schema", str(schema), "--choice", "x"), "--schema and --choice: an answer can be held to one of them"),
        (("--choice", ""), "an empty text is no answer"),
    ):
        outcome = invoke("run", "demo", "Hi", *arguments)
        assert outcome.status == 2
        assert message in outcome.err
    assert invoke("run", "demo", "Hi", "--schema", str(tmp_path / "none")).status == 1


def test_an_answer_that_is_not_what_it_has_to_be_is_a_failure(invoke, engine, monkeypatch):
    monkeypatch.setattr(sys.modules["fake_localmoe"].FakeStats, "fulfils_grammar", False)
    outcome = invoke("run", "demo", "Hi", "--choice", "yes", "-n", "2")
    assert (outcome.status, outcome.out) == (1, "Once upon\n")
    assert outcome.err.startswith("localmoe: the answer does not fulfil what was asked of it: it was cut off; allow")
    assert outcome.err.count("\n") == 1
    outcome = invoke("run", "demo", "Hi", "--choice", "yes", "--json")
    assert outcome.status == 1
    assert outcome.json["text"] == "Once upon a time."
    assert outcome.json["error"]["kind"] == "grammar"


def test_a_line_whose_answer_is_not_what_it_has_to_be_has_an_error(invoke, engine, monkeypatch):
    monkeypatch.setattr(sys.modules["fake_localmoe"].FakeStats, "fulfils_grammar", False)
    outcome = invoke("run", "demo", "--jsonl", "-", "--choice", "yes", stdin=b'"Hi"\n')
    assert outcome.status == 1
    assert outcome.json["text"] == "Once upon a time."
    assert outcome.json["error"]["kind"] == "grammar"
    assert invoke("run", "demo", "--jsonl", "-", "--session", "s", stdin=b'"Hi"\n').status == 2
