"""The demo model's card: what it is, how it was trained, what was measured, and stories it tells, unpicked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import localmoe
from localmoe.engine import Engine

PROMPTS = (
    "Tell me a story about a goat and a drum.", "Tell me a story about a little girl and the moon.",
    "Write a short story about a king who lost his crown.", "Tell me a story about a boat.",
    "A story about a bird and a stone, please.", "Tell me a story about a robot on the moon.",
    "Can you tell me a story about a mango tree?", "I would like to hear a story about a dog and a thief.",
    "Tell me a story about a river.", "Write the beginning of a story about an old house and a letter.",
)  # fmt: skip
SHOWN = 5
TEMPERATURES = (0.7, 0.9)
LENGTH = 200  # tokens
ECHO = 64  # random tokens, for `facts`
GUESSED = 60  # tokens of each greedy answer that MTP's acceptance is counted over


def write_card(out: Path) -> None:
    """README.md in OUT/model from OUT/log.jsonl and from what the model there says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures: dict[str, Any] = {}
    for line in lines:
        figures |= line if line.get("finished") or "before_extension" in line else {}
    model = out / "model"
    with localmoe.load(model, mtp=1) as engine:
        figures["acceptance"] = acceptance(engine)
    with localmoe.load(model, mtp=0) as engine:
        told = {temperature: list(stories(engine, temperature)) for temperature in TEMPERATURES}
    config = json.loads((model / "config.json").read_text())
    (model / "README.md").write_text(card(config, figures, lines, told), encoding="utf-8")


def stories(engine: Engine, temperature: float) -> Iterable[tuple[str, str]]:
    """The prompts with the model's answers, drawn as it advises at this temperature; seeds are the prompts' numbers."""
    sampling: dict[str, Any] = engine.generation_defaults | {"temperature": temperature}
    for seed, prompt in enumerate(PROMPTS):
        asked = [{"role": "user", "content": prompt}]
        steps = engine.generate(asked, max_tokens=LENGTH, seed=seed, **sampling)
        yield prompt, "".join(step.text for step in steps).strip()


def acceptance(engine: Engine) -> float:
    """The share of the MTP layer's guesses, one a time, that greedy answers accept."""
    drafted = accepted = 0
    for prompt in PROMPTS:
        steps = list(engine.generate([{"role": "user", "content": prompt}], max_tokens=GUESSED, temperature=0.0))
        stats = steps[-1].stats
        assert stats is not None
        assert stats.speculation is not None
        drafted += stats.speculation.drafted_tokens
        accepted += stats.speculation.accepted_tokens
    return accepted / max(drafted, 1)


def card(
    config: dict[str, Any], figures: dict[str, Any], lines: list[dict[str, Any]], told: dict[float, list[Any]]
) -> str:
    held = figures["held_out"]
    curve = [line for line in lines if "bits_per_character" in line]
    chosen = curve[:: max(len(curve) // 8, 1)]
    parts = [
        "# A miniature DeepSeek-V3",
        f"A trained model of {figures['weights'] / 1e6:.1f} M weights with DeepSeek-V3's architecture, shipped as "
        "DeepSeek ships V3: FP8 e4m3 in blocks of 128 x 128 with `weight_scale_inv`; router, norms, embeddings, head "
        "and `eh_proj` in bf16, `e_score_correction_bias` in float32. Made by `scripts/train_demo`.",
        table(("", ""), facts(config, figures)),
        "It writes short stories, continues them, and gives them titles. It knows nothing else: it is there to try a "
        "program with, not to be asked anything.",
        "## Learning",
        "Bits a character of stories never trained on, while it learned:",
        table(("step", *held), [(line["step"], *line["bits_per_character"].values()) for line in chosen]),
        "## Long contexts",
        "Nats a token by place, beginnings of long stories never trained on:",
        table(("", *figures["by_position"]), positions(figures)),
        "## Stories",
        f"The first {SHOWN} of {len(PROMPTS)} prompts, {LENGTH} tokens, unpicked, drawn as `generation_config.json` "
        "advises but for the temperature.",
    ]
    for temperature, answers in told.items():
        parts.append(f"### Temperature {temperature}")
        parts += [f"**{prompt}**\n\n{quoted(answer)}" for prompt, answer in answers[:SHOWN]]
    return "\n\n".join(parts) + "\n"


def facts(config: dict[str, Any], figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What it is and what was measured, a line each."""
    c = config
    held, tokens = figures["held_out"], figures["data_tokens"]
    rows = [
        ("hidden, layers, heads", f"{c['hidden_size']}, {c['num_hidden_layers']} (the first dense) + 1 MTP layer, "
         f"{c['num_attention_heads']}"),
        ("MLA", f"q_lora {c['q_lora_rank']}, kv_lora {c['kv_lora_rank']}, nope {c['qk_nope_head_dim']}, rope "
         f"{c['qk_rope_head_dim']}, v {c['v_head_dim']}; trained at 512 and 1,024 tokens, extended to "
         f"{c['max_position_embeddings']:,} by YaRN and a last stage of training"),
        ("MoE", f"{c['n_routed_experts']} routed experts in {c['n_group']} groups ({c['topk_group']} used), "
         f"{c['num_experts_per_tok']} a token, 1 shared, intermediate {c['moe_intermediate_size']}; sigmoid scores, "
         "`noaux_tc`, normalised, scale 1.5, balanced through the correction bias alone"),
        ("vocabulary", f"{c['vocab_size']}, byte-level BPE, DeepSeek-V3's special tokens and chat template shape; "
         "`thinking` opens `<think>`"),
        ("trained", f"{figures['step']:,} steps, {figures['tokens'] / 1e6:.1f} M tokens, "
         f"{figures['seconds'] / 60:.0f} minutes on {figures['device']}; Muon for the matrices, AdamW for the rest"),
        ("of that", ", ".join(f"{sort} {count / 1e6:.1f} M" for sort, count in tokens.items())),
        ("bits a character, stories never trained on",
         ", ".join(f"{kind} {bits:.2f}" for kind, bits in held.items())),
        (f"{ECHO} random tokens, read for the second time", f"{figures['echo']:.2f} nats a token; "
         f"{math.log(c['vocab_size']):.1f} by chance, 0 where all are copied"),
        ("MTP", f"{figures['acceptance']:.0%} of its guesses accepted, greedy answers to the prompts below"),
        ("licence", "weights CC-BY 4.0: trained on CC-BY children's stories from African Storybook and Pratham Books "
         "and on public-domain fiction"),
    ]  # fmt: skip
    if "eval" in figures:
        rows.insert(-2, ("bits a character, eval.txt", f"{figures['eval']:.3f}, in windows of 512 tokens"))
        uneven = ", ".join(f"{value:.2f}" for value in figures["eval_uneven"])
        rows.insert(-2, ("highest load of an expert over the mean, by layer, there", uneven))
    return rows


def positions(figures: dict[str, Any]) -> list[tuple[object, ...]]:
    names = {
        "before_extension": "before the extension, plain positions",
        "before_extension_yarn": "before the extension, YaRN",
        "by_position_of_1024": "finished, in windows of 1,024",
        "by_position": "finished, one window of 4,096",
    }
    return [(name, *figures[key].values()) for key, name in names.items() if key in figures]


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [" | ".join(map(str, row)) for row in (head, *rows)]
    lines.insert(1, " | ".join("---" for _ in lines[0].split(" | ")))
    return "\n".join(f"| {line} |" for line in lines)


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())
