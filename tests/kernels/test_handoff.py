"""The CPU's experts as the CUDA driver calls them: with a library that stands in for the driver."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from localmoe.formats import int4
from localmoe.formats.weights import Int4Weight
from localmoe.kernels import _cpu
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts, ExpertWeights

HIDDEN, INNER, EXPERTS, K = 64, 32, 6, 3
# As a driver does it: on a thread of its own, after the call has returned. Stream 0 is one that fails.
DRIVER = """
#include <pthread.h>
typedef void (*function)(void*);
static pthread_t thread;
static function todo;
static void* call(void* data) { todo(data); return 0; }
int cuLaunchHostFunc(void* stream, function run, void* data) {
  if (!stream) return 400;
  todo = run;
  return pthread_create(&thread, 0, call, data);
}
void finish(void) { pthread_join(thread, 0); }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("driver")
    (directory / "driver.c").write_text(DRIVER)
    library = directory / "libdriver.so"
    command = [compiler, "-shared", "-fPIC", str(directory / "driver.c"), "-o", str(library), "-lpthread"]
    subprocess.run(command, check=True)
    return library


def matrix(rows: int, columns: int) -> Int4Weight:
    q = torch.randint(-8, 8, (rows, columns)).to(torch.int8)
    return Int4Weight(int4.pack(q), ((torch.rand(rows, columns // 32) + 0.5) / 40).bfloat16(), 32)


@pytest.fixture
def experts() -> ExpertProducts:
    torch.manual_seed(1)
    weights: list[ExpertWeights] = [
        (matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER)) for _ in range(EXPERTS)
    ]
    return Kernels.choose("portable", 2).experts(EXPERTS, weights.__getitem__)


def test_the_driver_runs_the_experts_without_a_slot(experts: ExpertProducts, driver: Path) -> None:
    import ctypes

    hidden, weights = torch.randn(2, HIDDEN), torch.rand(2, K)
    ids = torch.tensor([[0, 5, 2], [1, 3, 4]], dtype=torch.int32)
    slots = torch.tensor([0, -1, -1, 1, -1, -1], dtype=torch.int32)
    result = torch.full((2, HIDDEN), 7.0)
    job = experts.job(hidden, ids, weights, slots, result)
    assert job is not None
    opened = _cpu.CudaDriver(str(driver))
    for slot in (0, -1):  # the job reads what its memory holds when it runs, slots too
        slots[0] = slot
        job.enqueue(opened, 1)
        ctypes.CDLL(str(driver)).finish()
        away = torch.where(slots[ids.long()] >= 0, -1, ids.long())
        assert torch.equal(result, experts(hidden, away, weights))
        assert bool((away == -1).any())
    with pytest.raises(RuntimeError, match="CUDA error 400"):
        job.enqueue(opened, 0)


def test_ids_that_are_no_experts_are_left_out(experts: ExpertProducts) -> None:
    """Memory that a card writes is not trusted to hold ids in range."""
    hidden, weights, result = torch.randn(1, HIDDEN), torch.rand(1, K), torch.empty(1, HIDDEN)
    ids = torch.tensor([[-5, 1 << 30, 2]], dtype=torch.int32)
    job = experts.job(hidden, ids, weights, torch.full((EXPERTS,), -1, dtype=torch.int32), result)
    assert job is not None
    job.run()
    assert torch.equal(result, experts(hidden, torch.tensor([[-1, -1, 2]]), weights))


def test_all_experts_elsewhere_add_nothing(experts: ExpertProducts) -> None:
    nothing = experts(torch.randn(2, HIDDEN), torch.full((2, K), -1), torch.rand(2, K))
    assert torch.equal(nothing, torch.zeros(2, HIDDEN))


def test_what_does_not_fit_is_refused(experts: ExpertProducts) -> None:
    ids, weights = torch.zeros(2, K, dtype=torch.int32), torch.rand(2, K)
    hidden, slots = torch.randn(2, HIDDEN), torch.full((EXPERTS,), -1, dtype=torch.int32)
    for wrong in (
        (hidden[:1], ids, weights, slots, hidden.clone()),
        (hidden, ids, weights[:, :1].contiguous(), slots, hidden.clone()),
        (hidden, ids, weights, slots[:-1], hidden.clone()),
        (hidden, ids, weights, slots, torch.empty(2, 8)),
        (torch.randn(2, 32), ids, weights, slots, torch.empty(2, 32)),
    ):
        with pytest.raises(ValueError, match=r"fit|shape|slot"):
            experts.job(*wrong)


def test_a_driver_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="cannot be opened"):
        _cpu.CudaDriver("libno-such-driver.so.1")


def test_the_reference_has_no_jobs() -> None:
    weights = (matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER))
    experts = Kernels.choose("reference").experts(1, lambda _: weights)
    assert not experts.complete()
    empty = torch.empty(1, 1, dtype=torch.int32)
    assert experts.job(torch.empty(1, HIDDEN), empty, torch.empty(1, 1), empty[0], torch.empty(1, HIDDEN)) is None
