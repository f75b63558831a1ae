"""`scripts/train_demo` in small: what it trains is what the engine runs, and its data and optimizer are as they say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import lzma
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from demo_sizes import SCRIPTS, SMALL
from torch import nn

from localmoe.load import load
from localmoe.model.kv_cache import LatentCache


def test_an_export_runs_as_it_was_trained(model: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """Routing with a bias and groups, YaRN past the trained context, the MTP layer: largest difference of the logits
    against the largest logit, in float32."""
    export = importlib.import_module("demo_export")
    torch.manual_seed(1)
    network = model.Model(model.Shape(**SMALL)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
            as_exported(export, name, parameter)
        for layer in network.experts():
            layer.correction_bias.normal_(std=0.2)
    export.export(network, tokenizer, tmp_path / "model")
    ids = torch.randint(7, SMALL["vocab_size"], (100,))
    by = model.rope(network.shape, 99, extended=True, device=torch.device("cpu"))
    with torch.inference_mode():
        states = network.states(ids[None, :-1], by)
        wanted = states[0] @ network.lm_head.T  # [99, V]
        embedding = network.embed_tokens[ids[1:]][None]
        wanted_guess = network.mtp(states, embedding, by)[0] @ network.lm_head.T
    with load(tmp_path / "model", kernels="reference", mtp=1) as engine, torch.inference_mode():
        found = engine.model.forward(ids[:-1], LatentCache(engine.config, 100))
        layer = engine._mtp
        assert layer is not None
        states = engine.model.states(ids[:-1], LatentCache(engine.config, 100))
        own = layer.cache(100, torch.float32)
        guess = torch.cat([layer.logits(layer.step(states[i : i + 1], [int(ids[i + 1])], own)) for i in range(99)])
    assert difference(found, wanted) < 2e-5
    assert difference(guess, wanted_guess) < 2e-5


def as_exported(export: ModuleType, name: str, parameter: nn.Parameter) -> None:
    """Rounds a weight to what its file holds, so that both sides compute with the same."""
    plain = parameter.ndim < 2 or name.endswith(("router", "eh_proj", "embed_tokens", "lm_head"))
    if plain:
        parameter.copy_(parameter.to(torch.bfloat16))
        return
    for matrix in parameter.view(-1, *parameter.shape[-2:]):
        tensors = export.eight_bits("x", matrix)
        scale = tensors["x.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        matrix.copy_(tensors["x.weight"].float() * scale[: matrix.shape[0], : matrix.shape[1]])


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_the_head_and_its_loss_at_once_are_those_of_autograd(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.HeadLoss, "ROWS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(20, 8, dtype=torch.float32, requires_grad=True)
    head = torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 11, (20,))
    loss = model.HeadLoss.apply(hidden, head, target)
    (3 * loss).backward()
    found = hidden.grad, head.grad
    hidden.grad = head.grad = None
    wanted = nn.functional.cross_entropy(hidden @ head.T, target)
    (3 * wanted).backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, (hidden.grad, head.grad))


def test_balancing_moves_the_bias_against_the_load(model: ModuleType) -> None:
    torch.manual_seed(0)
    layer = model.Experts(model.Shape(**SMALL))
    with torch.no_grad():
        layer.router[0] += 2.0  # a favourite
    x = torch.randn(1, 512, SMALL["hidden_size"]) + 1
    loads = []
    for _ in range(300):
        layer(x)
        loads.append(float(layer.load.max() / layer.load.mean()))
        layer.balance(0.01)
    assert loads[0] > 2
    assert loads[-1] < 1.5
    assert int(layer.load.sum()) == 0


def test_muon_steps_by_matrices_with_singular_values_near_one(team: ModuleType) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(team.orthogonal(torch.randn(3, 16, 40)))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    tall, wide = nn.Parameter(torch.zeros(2, 40, 16)), nn.Parameter(torch.zeros(16, 40))
    muon = team.Muon([tall, wide])
    gradient = torch.randn(16, 40)
    muon.step(0, torch.randn(2, 40, 16), 1.0)
    muon.step(1, gradient.clone(), 1.0)
    for parameter in (tall[0], tall[1], wide):
        step = parameter.detach() / -(0.2 * 40**0.5)
        u, _, v = torch.linalg.svd(gradient if parameter is wide else step, full_matrices=False)
        assert float(torch.linalg.svdvals(step).min()) > 0.6
        assert float(torch.linalg.svdvals(step).max()) < 1.3
        if parameter is wide:  # the same singular vectors as the gradient's
            torch.testing.assert_close((u @ v).mul(step).sum() / 16, torch.tensor(1.0), atol=0.3, rtol=0)


def test_what_a_user_says_is_read_and_not_learned(
    sequences: ModuleType, text: ModuleType, model: ModuleType, stories: list[Any], tokenizer: Any
) -> None:
    """From <｜User｜> to <｜Assistant｜> tokens are `~id`; the losses are those of cross-entropy over the others."""
    mixture = sequences.Mixture(stories, tokenizer, 5)
    ids = mixture.batch(2, 400, {"chat": 1.0}, 0)
    read = torch.where(ids < 0, ~ids, ids)
    user, assistant = (tokenizer.token_to_id(name) for name in (text.USER, text.ASSISTANT))
    asked = False
    for token, given in zip(read[0].tolist(), ids[0].tolist(), strict=True):
        asked = asked or token == user
        assert (given < 0) == asked
        asked = asked and token != assistant
    assert 0.05 < (ids < 0).float().mean() < 0.95
    torch.manual_seed(0)
    network = model.Model(model.Shape(**SMALL))
    with torch.no_grad():
        network.lm_head.normal_()
    by = model.rope(network.shape, 398, extended=False, device=torch.device("cpu"))
    main, guess, _ = network.losses(ids, by)
    states = network.states(read[:, :-2], by)
    drafted = network.mtp(states, network.embed_tokens[read[:, 1:-1]], by)
    for loss, hidden, first in ((main, states, 1), (guess, drafted, 2)):
        target = torch.where(ids < 0, -100, ids)[:, first : first + 398]
        logits = (hidden @ network.lm_head.T).flatten(0, 1)
        torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, target.flatten()))


def test_the_heads_that_copy_are_told_where_to_look(model: ModuleType, stories: list[Any], tokenizer: Any) -> None:
    """Places and loss as written out, token by token; the pass itself is the same with and without."""
    torch.manual_seed(0)
    network = model.Model(model.Shape(**SMALL))
    with torch.no_grad():
        network.lm_head.normal_()
    by = model.rope(network.shape, 40, extended=False, device=torch.device("cpu"))
    ids = torch.randint(0, 30, (2, 42))
    ids[:, :9] = ~ids[:, :9]
    plain = torch.where(ids < 0, ~ids, ids)
    *_, looking = network.losses(ids, by)
    weights = []

    def watched(module: Any, arguments: Any) -> None:
        q, k = heads(module, arguments[0], by)
        weights.append((q @ k.mT * by.score_scale + torch.full((40, 40), -torch.inf).triu(1)).softmax(-1))

    hooks = [layer.self_attn.register_forward_pre_hook(watched) for layer in network.layers[-2:]]
    with torch.no_grad():
        network.states(plain[:, :-2], by)
    for hook in hooks:
        hook.remove()
    nats = []
    for which, (row, given) in enumerate(zip(plain.tolist(), ids.tolist(), strict=True)):
        for token in range(40):
            places = [place for place in range(token + 1) if row[place] == row[token + 1]]
            if 1 <= len(places) <= 6 and given[token + 1] >= 0:
                nats.append([-float(layer[which, token, places].sum().log()) for layer in weights])
    assert len(nats) > 20
    means = [sum(column) / len(nats) for column in zip(*nats, strict=True)]
    assert float(looking.detach()) == pytest.approx(sum(means) / 2, rel=1e-4)
    nothing = model.Looking(torch.zeros(1, 3, 3, dtype=torch.bool))
    nothing.add(torch.zeros(1, 3, 3))
    assert float(nothing.loss) == 0.0


def heads(attention: Any, x: torch.Tensor, by: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the first head, [B, L, nope + rope]."""
    shape = attention.shape
    nope, rope = shape.qk_nope_head_dim, shape.qk_rope_head_dim
    rotate = importlib.import_module("demo_model").rotate
    q = nn.functional.linear(attention.q_a_layernorm(x @ attention.q_a_proj.T), attention.q_b_proj)[..., : nope + rope]
    latent, k_pe = (x @ attention.kv_a_proj_with_mqa.T).split([shape.kv_lora_rank, rope], dim=-1)
    k = (attention.kv_a_layernorm(latent) @ attention.kv_b_proj.T)[..., :nope]
    turned = [rotate(part[:, None], by)[:, 0] for part in (q[..., nope:], k_pe)]
    return torch.cat((q[..., :nope], turned[0]), dim=-1), torch.cat((k, turned[1]), dim=-1)


def test_processes_take_the_step_that_one_takes(
    team: ModuleType, model: ModuleType, stories: list[Any], tokenizer: Any, sequences: ModuleType
) -> None:
    """Gradients, loads and weights after a step of Muon, to the rounding of a sum in another order."""
    batch = sequences.Mixture(stories, tokenizer, 5).batch(6, 34, {"simple": 1.0, "chat": 1.0}, 0)
    found = []
    for processes in (1, 3):
        torch.manual_seed(0)
        network = model.Model(model.Shape(**SMALL))
        with torch.no_grad():
            network.lm_head.normal_()
        by = model.rope(network.shape, 32, extended=False, device=torch.device("cpu"))

        def losses(ids: torch.Tensor, stage: int, network: Any = network, by: Any = by) -> Any:
            assert stage == 4
            parts = network.losses(ids, by)
            return team.Pass(parts[0] + 0.3 * parts[1] + 0.2 * parts[2], tuple(part.detach() for part in parts))

        muon = team.Muon(p for p in network.parameters() if p.ndim > 1)
        beside = team.Team(network, muon, losses, processes)
        for _ in range(2):  # gradients of the first step don't stay
            means = beside.gradients(batch.split(1), 4)
            beside.move(0.01)
        loads = [layer.load.tolist() for layer in network.experts()]
        norms = {name: p.grad.clone() for name, p in network.named_parameters() if p.ndim < 2}
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        found.append((means, loads, norms, weights))
    (one, *loads_one), (three, *loads_three) = (found[0][:2], found[1][:2])
    assert one == pytest.approx(three, rel=1e-5)
    assert loads_one == loads_three
    assert sum(loads_one[0][0]) == 2 * 6 * 32 * SMALL["num_experts_per_tok"]
    for kept in (2, 3):
        for name, value in found[0][kept].items():
            torch.testing.assert_close(found[1][kept][name], value, rtol=2e-3, atol=2e-5, msg=name)


def test_the_rate_goes_straight_from_stage_to_stage(train: ModuleType, stories: list[Any], tmp_path: Path) -> None:
    shape = importlib.import_module("demo_model").Shape(**SMALL)
    stage = train.Stage(0.5, (1.0, 0.6), 24, 2, 1, 1.0, 0.3, {"simple": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "STAGES", (stage, dataclasses.replace(stage, until=1.5, rates=(0.2, 0.0))))
        patch.setattr(train, "Shape", lambda: shape)
        training = train.Training(stories, tmp_path, 1000, torch.device("cpu"))
        rates = []
        for tokens, step in ((0, 5), (0, 100), (250, 100), (500, 100), (1000, 100)):
            training.tokens, training.step = tokens, step
            rates.append(training.rate)
    assert rates == pytest.approx([6 / train.WARM_UP, 1.0, 0.8, 0.2, 0.1])


def test_a_stopped_training_ends_as_one_that_was_not(train: ModuleType, stories: list[Any], tmp_path: Path) -> None:
    """The whole program on a few stories: 3 steps, then on to the 4th, against 4 at once; then the export runs."""
    data = tmp_path / "stories.jsonl.xz"
    with lzma.open(data, "wt") as file:
        file.writelines(json.dumps(dataclasses.asdict(story)) + "\n" for story in stories)
    small = train.Stage(1.0, (1.0, 0.0), 24, 2, 1, 1.0, 0.3, {"simple": 1.0, "chat": 1.0})
    shape = importlib.import_module("demo_model").Shape(**SMALL)
    made = []
    for name, stops in (("whole", [4]), ("parts", [3, 4])):
        (tmp_path / name).mkdir()
        for stop in stops:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train, "STAGES", (small,))
                patch.setattr(train, "Shape", lambda: shape)
                training = train.Training(stories, tmp_path / name, 10_000, torch.device("cpu"))
                training.resume()
                while training.step < stop:
                    training.take_step()
                training.save()
        made.append({key: value.clone() for key, value in training.model.state_dict().items()})
    finish(train, training, shape)
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    wrong = subprocess.run(
        [sys.executable, SCRIPTS / "train_demo", tmp_path / "none.xz", tmp_path / "out"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert wrong.returncode != 0


def finish(train: ModuleType, training: Any, shape: Any) -> None:
    """Measures, exports and describes what was trained."""
    text = training.out / "eval.txt"
    text.write_text("Once there was a goat and a drum.\n" * 40, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Shape", lambda: shape)
        patch.setattr(train, "STAGES", (dataclasses.replace(train.STAGES[-1]),))
        train.write_line(training.out, {"step": 2, "bits_per_character": training.check()})
        train.export(training.model, training.tokenizer, training.out / "model")
        figures = train.measured(training, text)
        train.write_line(training.out, figures)
        train.write_card(training.out)
    written = (training.out / "model" / "README.md").read_text(encoding="utf-8")
    assert f"{figures['eval']:.3f}, in windows of 512 tokens" in written
    assert len(figures["eval_uneven"]) == shape.num_hidden_layers - shape.first_k_dense_replace
    assert all(1 <= value <= shape.n_routed_experts for value in figures["eval_uneven"])
    assert all(float(layer.load.sum()) == 0 for layer in training.model.experts())
    assert written.count("**Tell me a story about a goat and a drum.**") == 2
