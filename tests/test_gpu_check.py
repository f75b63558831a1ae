"""`scripts/gpu_check` where there is no GPU: its steps in tiny on Triton's interpreter, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


@pytest.fixture(scope="module")
def sections() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_sections", SCRIPTS / "gpu_sections.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_sections"] = module  # dataclasses look there
    sys.path.insert(0, str(SCRIPTS))
    spec.loader.exec_module(module)
    return module


def gpu_check(*arguments: str) -> tuple[int, list[str], dict[str, Any]]:
    """Exit status, lines, and the JSON object of the last one."""
    command = [sys.executable, str(SCRIPTS / "gpu_check"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    return done.returncode, lines, json.loads(lines[-1])


@needs_no_gpu
@pytest.mark.parametrize(
    ("name", "count", "figures"),
    [
        ("bandwidth", 3, ("gbps",)),
        ("knobs", 25, ("gain",)),
        ("matvec", 4, ("eager_us", "gbps", "share")),
        ("matmul", 5, ("eager_us", "tflops")),
        ("experts", 4, ("eager_us", "gbps", "share")),
        ("decode", 2, ("eager_us", "gbps", "share")),
        ("engine", 1, ("prefill_tps", "decode_tps", "open_s")),
        ("calls", 1, ()),
        ("check_guesses", 1, ("answers", "gain", "right")),
    ],
)
def test_timings(name: str, count: int, figures: tuple[str, ...], sections: ModuleType) -> None:
    of = next(each for each in (sections, sections.gpu_engine, sections.gpu_knobs) if hasattr(each, name))
    rows = list(getattr(of, name)(sections.Bench("cpu")))
    assert len(rows) == count
    for row in rows:
        assert "error" not in row
        assert all(row[figure] > 0 for figure in figures)


@needs_no_gpu
def test_where_two_answers_part(sections: ModuleType) -> None:
    """The demo goes on from 310 with 18: any other token's logit is below that; one that ends early is no near-tie."""
    margins = sections.gpu_engine.margins_of(sections.Bench("cpu"), [([310], [18], [19]), ([310], [18, 287], [18])])
    assert 0.01 < margins[0] < math.inf
    assert margins[1] == math.inf


@needs_no_gpu
def test_a_case_that_fails_is_a_row(sections: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: torch.device) -> None:
        raise AssertionError(f"off on {device}")

    cases = ModuleType("cases")
    monkeypatch.setattr(cases, "small_cases", lambda: {"norm": {"a": wrong, "b": lambda device: None}}, raising=False)
    monkeypatch.setattr(sections, "load_cases", lambda: cases)
    rows = list(sections.check(sections.Bench("cpu"), "norm"))
    assert rows == [{"case": "a", "error": "AssertionError: off on cpu"}, {"case": "b"}]


@needs_no_gpu
def test_a_launch_that_does_not_fit_is_a_row(sections: ModuleType) -> None:
    out = torch.zeros(1)

    def prepare(launch: Any) -> Any:
        if launch.fold_rows == 512:
            raise RuntimeError("out of\nregisters")
        return lambda: time.sleep(0.04 if launch.fold_rows == 16 else 0.01), out, 1

    changes = [{"fold_rows": 512}, {"fold_rows": 16}]
    default, refused, slow = sections.gpu_knobs.compared(sections.Bench("cpu"), "fold", changes, prepare)
    assert (default["change"], default["gain"]) == ("default", 1.0)
    assert refused == {"what": "fold", "change": "fold_rows 512", "skipped": "RuntimeError: out of registers"}
    assert slow["gain"] < 1


@needs_no_gpu
def test_matrices_are_as_upload_makes_them(sections: ModuleType) -> None:
    cases = sections.load_cases()
    for form in sections.FORMS:
        uploaded = cases.upload([cases.random_matrix(form, 16, 128)] * 2, torch.device("cpu"))
        made = sections.Bench("cpu").matrix(form, 16, 128, 2)
        assert (made.kind, made.group, made.count, made.nbytes) == (
            uploaded.kind, uploaded.group, uploaded.count, uploaded.nbytes,
        )  # fmt: skip
        assert (made.values.dtype, made.values.shape) == (uploaded.values.dtype, uploaded.values.shape)
        if made.octets:
            assert (made.scales.dtype, made.scales.shape) == (uploaded.scales.dtype, uploaded.scales.shape)


def test_on_the_interpreter() -> None:
    status, lines, result = gpu_check("--device", "cpu", "--sections", "environment,check-norm")
    assert status == 0, lines
    assert result["failed"] == []
    assert result["sections"]["check-norm"]["passed"] == result["sections"]["check-norm"]["cases"] == 2
    assert result["sections"]["environment"]["rows"][0][1] == torch.__version__


@needs_no_gpu
def test_sections_fail_one_by_one() -> None:
    status, _, result = gpu_check("--sections", "environment,bandwidth")
    assert status == 1
    assert result["failed"] == ["environment", "bandwidth"]
    for section in result["sections"].values():
        assert section["status"] == "failed"
        assert "CUDA" in section["said"] or "NVIDIA" in section["said"]


def test_out_of_time_and_unknown_sections() -> None:
    status, _, result = gpu_check("--device", "cpu", "--sections", "environment,matvec", "--seconds", "0")
    assert status == 1
    assert {section["status"] for section in result["sections"].values()} == {"out of time"}
    command = [sys.executable, str(SCRIPTS / "gpu_check"), "--sections", "no-such"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no section is named no-such" in done.stderr
