"""The CPU's experts as the CUDA driver calls them: with a library that stands in for the driver."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from localmoe.formats import int4
from localmoe.formats.weights import Int4Weight
from localmoe.kernels import _cpu
from localmoe.kernels.calls import answered, callers
from localmoe.kernels.dispatch import Kernels
from localmoe.kernels.experts import ExpertProducts, ExpertWeights

HIDDEN, INNER, EXPERTS, K = 64, 32, 6, 3
# As a driver does it: on a thread of its own, after the call has returned. Stream 0 is one that fails. A wait of ten
# seconds is given up.
DRIVER = """
#include <pthread.h>
#include <stdint.h>
#include <unistd.h>
typedef void (*function)(void*);
static pthread_t thread;
static function todo;
static void* call(void* data) { todo(data); return 0; }
int cuLaunchHostFunc(void* stream, function run, void* data) {
  if (!stream) return 400;
  todo = run;
  return pthread_create(&thread, 0, call, data);
}
int finish(void) { void* failed; pthread_join(thread, &failed); return failed != 0; }

#ifdef MEMORY_OPERATIONS
typedef struct {
  int kind;
  uint64_t address;
  union { uint32_t value; uint64_t value64; };
  unsigned flags;
  uint64_t alias;
} wait_or_write;
typedef union { int kind; wait_or_write of; uint64_t room[6]; } operation;
enum { WAIT = 1, WRITE = 2, EQUAL = 1 };
static operation operations[256];
static unsigned count;
static void* do_all(void* data) {
  for (unsigned i = 0; i < count; ++i) {
    wait_or_write* op = &operations[i].of;
    uint32_t* word = (uint32_t*)op->address;
    if (op->kind == WRITE && op->flags == 0) __atomic_store_n(word, op->value, __ATOMIC_SEQ_CST);
    else if (op->kind != WAIT || op->flags != EQUAL) return (void*)1;
    else for (int naps = 0; __atomic_load_n(word, __ATOMIC_SEQ_CST) != op->value; ++naps) {
      if (naps == 10000) return (void*)2;
      usleep(1000);
    }
  }
  return 0;
}
int cuStreamBatchMemOp_v2(void* stream, unsigned n, operation* wanted, unsigned flags) {
  if (!stream || flags) return 400;
  for (count = 0; count < n; ++count) operations[count] = wanted[count];
  return pthread_create(&thread, 0, do_all, 0);
}
#endif
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a driver, with what is defined."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")

    def made(*defined: str) -> Path:
        directory = tmp_path_factory.mktemp("driver")
        (directory / "driver.c").write_text(DRIVER)
        library = directory / "libdriver.so"
        options = ["-shared", "-fPIC", *(f"-D{name}" for name in defined)]
        subprocess.run([compiler, *options, str(directory / "driver.c"), "-o", str(library), "-lpthread"], check=True)
        return library

    return made


@pytest.fixture(scope="module")
def driver(build: Callable[..., Path]) -> Path:
    return build("MEMORY_OPERATIONS")


def finished(driver: Path) -> bool:
    """Waits for what the driver was told last; whether it was done."""
    return bool(ctypes.CDLL(str(driver)).finish() == 0)


def words() -> np.ndarray:
    return torch.zeros(128, dtype=torch.uint8).numpy()


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


@pytest.mark.parametrize("name", ["host functions", "memory operations"])
def test_the_driver_runs_the_experts_without_a_slot(experts: ExpertProducts, driver: Path, name: str) -> None:
    hidden, weights = torch.randn(2, HIDDEN), torch.rand(2, K)
    ids = torch.tensor([[0, 5, 2], [1, 3, 4]], dtype=torch.int32)
    slots = torch.tensor([0, -1, -1, 1, -1, -1], dtype=torch.int32)
    result = torch.full((2, HIDDEN), 7.0)
    job = experts.job(hidden, ids, weights, slots, result)
    assert job is not None
    caller = callers(str(driver))[name]
    for slot in (0, -1, -1):  # the job reads what its memory holds when it runs, slots too
        slots[0] = slot
        result.fill_(7)
        job.enqueue(caller, 1)
        assert finished(driver)
        away = torch.where(slots[ids.long()] >= 0, -1, ids.long())
        assert torch.equal(result, experts(hidden, away, weights))
        assert bool((away == -1).any())
    with pytest.raises(RuntimeError, match="CUDA error 400"):
        job.enqueue(caller, 0)


def test_a_doorbell_knows_one_work_from_another(experts: ExpertProducts, driver: Path) -> None:
    bell = callers(str(driver))["memory operations"]
    ids, slots = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.full((EXPERTS,), -1, dtype=torch.int32)
    hidden, weights = torch.randn(3, 1, HIDDEN), torch.rand(1, K)
    results = torch.zeros(3, 1, HIDDEN)
    jobs = [experts.job(x, ids, weights, slots, y) for x, y in zip(hidden, results, strict=True)]
    for number in (2, 0, 1, 1, 2):
        results.zero_()
        job = jobs[number]
        assert job is not None
        job.enqueue(bell, 1)
        assert finished(driver)
        assert [bool(result.any()) for result in results] == [each == number for each in range(3)]
        assert torch.equal(results[number], experts(hidden[number], ids.long(), weights))
    bell.ring(1)
    assert finished(driver)


def test_a_doorbell_answers_after_a_long_silence(driver: Path) -> None:
    """Its thread sleeps by then."""
    bell = callers(str(driver))["memory operations"]
    time.sleep(1.2)
    bell.ring(1)
    assert finished(driver)


def test_a_doorbell_that_is_stopped_answers_what_was_asked(driver: Path) -> None:
    bell = callers(str(driver))["memory operations"]
    assert isinstance(bell, _cpu.Doorbell)
    bell.ring(1)
    bell.stop()
    assert finished(driver)
    bell.stop()
    bell.ring(1)
    threading.Timer(0.1, bell.let_go).start()  # nobody else lets the stream go on
    assert finished(driver)


def test_who_asks_in_vain_is_let_go(driver: Path) -> None:
    """As if memory operations did not reach the CPU: the card is free again, and the way there counts as none."""
    bell = callers(str(driver))["memory operations"]
    assert isinstance(bell, _cpu.Doorbell)
    bell.ring(1)
    assert finished(driver)
    bell.stop()
    bell.ring(1)
    stream = threading.Thread(target=finished, args=(driver,))
    stream.start()
    done = SimpleNamespace(query=lambda: not stream.is_alive())
    assert not answered(done, bell, time.perf_counter() + 0.05)  # type: ignore[arg-type]
    assert not stream.is_alive()


def test_a_driver_without_memory_operations(build: Callable[..., Path]) -> None:
    older = build()
    assert list(callers(str(older))) == ["host functions"]
    with pytest.raises(RuntimeError, match="no stream memory operations"):
        _cpu.Doorbell(_cpu.CudaDriver(str(older)), words())


def test_words_that_are_no_doorbell(driver: Path) -> None:
    opened = _cpu.CudaDriver(str(driver))
    for wrong in (words()[:127], np.zeros(256, np.uint8)[1:]):
        with pytest.raises(ValueError, match="words of a doorbell"):
            _cpu.Doorbell(opened, wrong)


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
