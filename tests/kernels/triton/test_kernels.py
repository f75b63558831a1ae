"""The cases of `cases.py`, one a test, on the interpreter where there is no GPU; and what the kernels refuse."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from localmoe.kernels.triton.launch import launch_for
from localmoe.kernels.triton.mla_decode import attend, new_workspace

_spec = importlib.util.spec_from_file_location("triton_cases", Path(__file__).with_name("cases.py"))
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def named(of: dict[str, dict[str, cases.Case]]) -> list[object]:
    return [pytest.param(case, id=f"{kernel}: {name}") for kernel, own in of.items() for name, case in own.items()]


@pytest.mark.parametrize("case", named(cases.small_cases()))
def test_small(case: cases.Case, device: torch.device) -> None:
    torch.manual_seed(3)
    case(device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="minutes on the interpreter")
@pytest.mark.parametrize("case", named(cases.real_cases()))
def test_real(case: cases.Case, device: torch.device) -> None:
    torch.manual_seed(3)
    case(device)


def test_a_workspace_for_others_is_refused(device: torch.device) -> None:
    launch = launch_for(device)
    q_latent, q = torch.zeros(2, 4, 16, device=device), torch.zeros(2, 4, 16, device=device)
    cache, start = torch.zeros(8, 24, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    for workspace in (new_workspace(1, 4, 16, launch, device), new_workspace(2, 5, 16, launch, device)):
        with pytest.raises(ValueError, match="does not serve 2 rows of 4 heads of 16"):
            attend(q_latent, q, cache, start, workspace, torch.empty_like(q_latent), launch, nope=8, scale=1.0)
