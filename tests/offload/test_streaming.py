"""Groups of experts on their way to the card: what arrives, and when a place is used again."""

from __future__ import annotations

import pytest
import torch

from localmoe.formats import int4
from localmoe.formats.weights import DenseWeight, Int4Weight
from localmoe.kernels.experts import ExpertWeights
from localmoe.kernels.triton.weights import DeviceMatrix
from localmoe.offload.streaming import Streamer, used_experts


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def expert(number: int) -> ExpertWeights:
    packed = int4.pack(torch.full((8, 32), number - 8, dtype=torch.int8))
    weight = Int4Weight(packed, torch.full((8, 1), float(number)).bfloat16(), 32)
    return weight, weight, DenseWeight(torch.full((32, 8), float(number)).bfloat16())


def rows(matrix: DeviceMatrix, slot: int) -> torch.Tensor:
    return matrix.values.view(matrix.count, matrix.out_features, -1)[slot].cpu()


@pytest.mark.parametrize("experts_a_buffer", [1, 2, 3, 10])
def test_every_expert_arrives_once_with_its_own_weights(experts_a_buffer: int, device: torch.device) -> None:
    size = sum(weight.nbytes for weight in expert(1))
    streamer = Streamer(device, size * experts_a_buffer + 1)
    for wanted in ([1, 4, 5, 6, 7], [0, 9]):  # the second layer uses the first one's memory
        seen = []
        for stack in streamer.groups(expert, wanted, 12):
            for number, slot in enumerate(stack.slots.tolist()):
                if slot < 0:
                    continue
                seen.append(number)
                gate, _, down = expert(number)
                assert torch.equal(rows(stack.gate, slot), gate.packed)
                assert torch.equal(rows(stack.down, slot), down.tensor)
                assert float(stack.up.scales.view(stack.up.count, -1)[slot, 0]) == number
        assert seen == wanted
    assert list(streamer.groups(expert, [], 12)) == []


def test_a_buffer_holds_at_least_one_expert(device: torch.device) -> None:
    assert [stack.slots.tolist() for stack in Streamer(device, 1).groups(expert, [2, 3], 4)] == [
        [-1, -1, 0, -1],
        [-1, -1, -1, 0],
    ]


def test_experts_that_a_pass_uses() -> None:
    ids = torch.tensor([[3, 1], [1, 0]])
    assert used_experts(ids, torch.tensor([True, False, True, True])) == [0, 3]
