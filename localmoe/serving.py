"""Whether vLLM and SGLang load a model's files unchanged, on how many GPUs, and with which commands.

The engines' own conditions, written down as code: each problem names the engine's source that its rule was read from
(November 2026). They were read there and not run here. Shapes come from config.json alone; no weight is looked at.
TP = tensor parallel size, EP = expert parallel size.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localmoe.formats.scheme import QuantizationConfig, Scheme
    from localmoe.model.config import ModelConfig

ENGINES = ("vLLM", "SGLang")
TENSOR_PARALLEL = (1, 2, 4, 8, 16, 32)
"""The sizes that are tried: GPUs come in powers of two."""

MARLIN_GROUPS = (32, 64, 128)
MARLIN_OUT, MARLIN_IN = 64, 128  # a linear's rows and columns on one GPU are multiples of these
MARLIN_MOE_HIDDEN, MARLIN_MOE_WIDTH = 128, 64  # and an expert's hidden size and width
PADS_TILES = {"vLLM": True, "SGLang": False}
"""Whether the engine pads what is no multiple of them, all but the hidden size; groups must divide it all the same.
vLLM does from 0.25 on (`allow_tile_padding`); an older one takes what SGLang takes."""

PLAIN_EMBEDDING = "unquantized embedding"
TRANSFORMERS = (
    "transformers (5.23) does not load it either, as it is: it gives every embedding first values, and a quantized one "
    "has nothing to hold them. These files are for localmoe."
)
"""What is to be said where that rule is broken (tests/quantize/test_interop.py tries it)."""

TIKTOKEN = (
    "The tokenizer here is a tiktoken.model. These engines read one with Python code that its makers ship beside it, "
    "which these files are without: name the makers' repository as the tokenizer (vLLM: `--tokenizer OWNER/NAME "
    "--trust-remote-code`)."
)
"""What is to be said of Moonshot's models (Moonlight, Kimi-K2)."""

_VLLM = "vllm/model_executor/layers/quantization"
_SGLANG = "sglang/srt/layers"
_MARLIN = f"{_VLLM}/utils/marlin_utils.py"


@dataclass(frozen=True)
class Problem:
    """A condition of `engine` that the model does not meet, and the engine's file and function that it stands in."""

    engine: str
    rule: str
    what: str
    source: str


@dataclass(frozen=True)
class EngineSupport:
    """What one engine makes of the model. Without `problems` it loads it, on TP GPUs out of `tensor_parallel`, with
    every expert cut in TP pieces; or out of `tensor_parallel_whole_experts`, with the experts shared out whole among
    `expert_parallel` GPUs. `commands` are (what for, lines to type)."""

    engine: str
    problems: tuple[Problem, ...]
    tensor_parallel: tuple[int, ...]
    tensor_parallel_whole_experts: tuple[int, ...]
    expert_parallel: tuple[int, ...]
    commands: tuple[tuple[str, tuple[str, ...]], ...]


class Layout:
    """A config.json taken apart: the model's linear modules with [out, in], and how each is stored.

    Raises UnsupportedModelError for a model or a quantization that localmoe does not read.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        from localmoe.formats.scheme import QuantizationConfig
        from localmoe.model.config import ModelConfig
        from localmoe.model.shapes import expected_modules

        self.model: ModelConfig = ModelConfig.from_dict(config)
        raw = config.get("quantization_config")
        self.raw: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
        self.quantization: QuantizationConfig | None = None
        if self.raw and self.raw.get("quant_method") != "fp8":
            self.quantization = QuantizationConfig.from_dict(self.raw)
        self.modules = expected_modules(self.model)
        found = self.quantization
        self.embedding_scheme: Scheme | None = found.scheme_for("model.embed_tokens") if found is not None else None
        self._schemes = {name: found.scheme_for(name) for name in self.modules} if found is not None else {}

    def scheme(self, module: str) -> Scheme | None:
        """How a module is stored, None where it is not quantized."""
        return self._schemes.get(module)

    @cached_property
    def linears(self) -> set[tuple[str, int, int, Scheme]]:
        """(name, out, in, scheme) of the quantized linears outside the routed experts, each once."""
        return {
            (module.rpartition(".")[2], rows, columns, scheme)
            for module, (rows, columns) in self.modules.items()
            if (scheme := self.scheme(module)) is not None and ".mlp.experts." not in module
        }

    @cached_property
    def experts(self) -> list[str]:
        """The routed experts' modules."""
        return [module for module in self.modules if ".mlp.experts." in module]

    @cached_property
    def expert_scheme(self) -> Scheme | None:
        """The first expert's; rules see to it that it is everyone's."""
        return self.scheme(self.experts[0]) if self.experts else None


def support(config: Mapping[str, Any], path: str) -> tuple[EngineSupport, ...]:
    """What each engine makes of the model with this config.json, which lies at `path`.

    Raises UnsupportedModelError as `Layout` does.
    """
    layout = Layout(config)
    return tuple(_support(engine, layout, path) for engine in ENGINES)


def _support(engine: str, layout: Layout, path: str) -> EngineSupport:
    problems = tuple(problem for rule in RULES for problem in rule(layout) if problem.engine == engine)
    if problems:
        return EngineSupport(engine, problems, (), (), (), ())
    padded = PADS_TILES[engine]

    def sizes(whole_experts: bool) -> tuple[int, ...]:
        found = {size: [*tensor_parallel_problems(layout, size, whole_experts, padded)] for size in TENSOR_PARALLEL}
        return tuple(size for size, problems in found.items() if not problems)

    cut, whole = sizes(False), sizes(True)
    experts = layout.model.n_routed_experts
    shares = tuple(size for size in TENSOR_PARALLEL if experts % size == 0)
    if not whole:
        reasons = sorted({*tensor_parallel_problems(layout, 1, True, padded)})
        problems = tuple(Problem(engine, "shapes", what, source) for what, source in reasons)
        return EngineSupport(engine, problems, (), (), (), ())
    commands = _vllm_commands if engine == "vLLM" else _sglang_commands
    return EngineSupport(engine, (), cut, whole, shares, tuple(commands(path, whole, shares)))


def tensor_parallel_problems(layout: Layout, size: int, whole_experts: bool, padded: bool) -> Iterator[tuple[str, str]]:
    """(what is in the way, the source that says so) of TP = `size`; experts are cut too unless they stay whole.
    `padded`: the engine pads tiles, so only groups must not be cut."""
    model = layout.model
    heads = model.num_attention_heads
    if heads % size:
        yield (
            f"{heads} attention heads are not a multiple of {size}",
            "vllm/config/model.py: verify_with_parallel_config",
        )
    for name, rows, columns, scheme in sorted(layout.linears, key=str):
        yield from _linear(name, rows, columns, size, scheme, padded)
    if model.intermediate_size % size or (model.n_shared_experts * model.moe_intermediate_size) % size:
        yield f"the MLPs cannot be cut in {size}", "vllm/model_executor/layers/linear.py: divide"
    if layout.expert_scheme is not None:
        yield from _experts(model, layout.expert_scheme, 1 if whole_experts else size, padded)


def _linear(name: str, rows: int, columns: int, size: int, scheme: Scheme, padded: bool) -> Iterator[tuple[str, str]]:
    """Marlin's conditions of a quantized linear. o and down are cut along their columns, the latent's projections not
    at all, the others along their rows. Merged ones (q_a with kv_a, gate with up) meet them when their parts do."""
    source = f"{_MARLIN}: verify_marlin_supports_shape"
    if name in ("o_proj", "down_proj"):
        columns /= size  # type: ignore[assignment]  # a fraction is a multiple of nothing
    elif name not in ("q_a_proj", "kv_a_proj_with_mqa"):
        rows /= size  # type: ignore[assignment]
    if rows % (1 if padded else MARLIN_OUT):
        yield f"{name} has {rows:g} rows on each of {size} GPUs, not a multiple of {MARLIN_OUT}", source
    step = scheme.group_size if padded else max(MARLIN_IN, scheme.group_size)
    if columns % step:
        yield f"{name} has {columns:g} columns on each of {size} GPUs, not a multiple of {step}", source


def _experts(model: ModelConfig, scheme: Scheme, size: int, padded: bool) -> Iterator[tuple[str, str]]:
    """Marlin's conditions of experts that are cut in `size` pieces."""
    source = f"{_MARLIN}: check_moe_marlin_supports_layer"
    width, group = model.moe_intermediate_size / size, scheme.group_size
    if model.hidden_size % max(MARLIN_MOE_HIDDEN, group):
        yield f"the hidden size of {model.hidden_size} is not a multiple of {MARLIN_MOE_HIDDEN}", source
    step = group if padded else max(MARLIN_MOE_WIDTH, group)
    if width % step:
        yield f"an expert's width is {width:g} on each of {size} GPUs, not a multiple of {step}", source


Rule = Callable[[Layout], Iterator[Problem]]


def method(layout: Layout) -> Iterator[Problem]:
    """Both know compressed-tensors' packed integers; nobody knows `localmoe-nf4`."""
    found = layout.raw.get("quant_method", "none")
    if layout.raw and (found, layout.raw.get("format")) != ("compressed-tensors", "pack-quantized") and found != "fp8":
        for engine in ENGINES:
            yield Problem(engine, "method", f"no quant_method {found!r} there", f"{_VLLM}/__init__.py")


def symmetric(layout: Layout) -> Iterator[Problem]:
    """No zero points: SGLang asserts it of the experts, and our layout has none."""
    for name, weights in _weights(layout):
        if weights.get("symmetric") is not True:
            source = f"{_SGLANG}/quantization/compressed_tensors/schemes/compressed_tensors_wNa16_moe.py: __init__"
            for engine in ENGINES:
                yield Problem(engine, "symmetric", f"{name} is not symmetric", source)


def no_act_order(layout: Layout) -> Iterator[Problem]:
    """With `actorder: group` the columns of down_proj could not be cut, and g_idx tensors would be needed."""
    for name, weights in _weights(layout):
        if weights.get("actorder") not in (None, False, "static", "weight"):
            source = f"{_VLLM}/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py: get_moe_method"
            for engine in ENGINES:
                yield Problem(engine, "no act-order", f"{name} has actorder {weights['actorder']!r}", source)


def group_sizes(layout: Layout) -> Iterator[Problem]:
    """Marlin has kernels for groups of 32, 64 and 128 (and whole rows, which we do not write)."""
    for name, weights in _weights(layout):
        if weights.get("group_size") not in MARLIN_GROUPS:
            what = f"{name} has groups of {weights.get('group_size')}"
            for engine in ENGINES:
                yield Problem(engine, "group size", what, f"{_MARLIN}: MARLIN_SUPPORTED_GROUP_SIZES")


def one_expert_scheme(layout: Layout) -> Iterator[Problem]:
    """gate, up and down of every expert share one scheme: they are fused into two tensors a layer."""
    schemes = {layout.scheme(module) for module in layout.experts}
    if len(schemes) > 1:
        source = f"{_VLLM}/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py: get_moe_method"
        named = ", ".join(sorted("unquantized" if s is None else f"{s.kind} g{s.group_size}" for s in schemes))
        for engine in ENGINES:
            yield Problem(engine, "one scheme for all experts", f"the routed experts have {named}", source)


def experts_are_the_linear_group(layout: Layout) -> Iterator[Problem]:
    """SGLang takes the experts' scheme from the group whose targets say `Linear`."""
    if layout.quantization is None or layout.expert_scheme is None:
        return
    of_linear = [group.scheme for group in layout.quantization.groups if "Linear" in group.targets]
    if of_linear != [layout.expert_scheme]:
        source = f"{_SGLANG}/quantization/compressed_tensors/compressed_tensors.py: get_moe_scheme"
        yield Problem("SGLang", "the experts' group", "no group with the target Linear has the experts' scheme", source)


def merged_linears(layout: Layout) -> Iterator[Problem]:
    """gate with up, and q_a with kv_a, are merged into one linear each: one scheme for both."""
    for module in layout.modules:
        for first, second in (("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa")):
            if module.endswith(f".{first}"):
                other = f"{module.removesuffix(first)}{second}"
                if layout.scheme(module) != layout.scheme(other):
                    source = f"{_VLLM}/compressed_tensors/utils.py: find_matched_target"
                    for engine in ENGINES:
                        yield Problem(engine, "merged linears", f"{module} and {second} differ", source)
                    return


def plain_head(layout: Layout) -> Iterator[Problem]:
    """A packed head is loaded by no SGLang and by recent vLLM only."""
    if layout.scheme("lm_head") is not None and not layout.model.tie_word_embeddings:
        source = f"{_SGLANG}/vocab_parallel_embedding.py: ParallelLMHead"
        for engine in ENGINES:
            yield Problem(engine, "unquantized head", "lm_head is quantized", source)


def plain_embedding(layout: Layout) -> Iterator[Problem]:
    """vLLM's recent versions read rows of a packed embedding, in some of their models. SGLang takes every embedding for
    a plain one: it leaves the packed tensors out with no more than a warning, and goes on."""
    if layout.embedding_scheme is not None:
        left_out = {"vLLM": "", "SGLang": ", and would be left out without an error"}
        for engine in ENGINES:
            package = _VLLM if engine == "vLLM" else f"{_SGLANG}/quantization"
            source = f"{package}/compressed_tensors/compressed_tensors.py: get_quant_method"
            yield Problem(engine, PLAIN_EMBEDDING, f"model.embed_tokens is quantized{left_out[engine]}", source)


def plain_kv_b(layout: Layout) -> Iterator[Problem]:
    """SGLang absorbs kv_b_proj at loading and wants its numbers, not packed words."""
    if any(layout.scheme(module) is not None for module in layout.modules if module.endswith(".kv_b_proj")):
        source = "sglang/srt/models/deepseek_v2.py: post_load_weights"
        yield Problem("SGLang", "unquantized kv_b_proj", "kv_b_proj is quantized", source)


RULES: tuple[Rule, ...] = (
    method,
    symmetric,
    no_act_order,
    group_sizes,
    one_expert_scheme,
    experts_are_the_linear_group,
    merged_linears,
    plain_head,
    plain_embedding,
    plain_kv_b,
)


def _weights(layout: Layout) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, group in (layout.raw.get("config_groups") or {}).items():
        yield f"config_groups.{name}", group["weights"]


def _vllm_commands(path: str, sizes: tuple[int, ...], shares: tuple[int, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """docs.vllm.ai/en/latest/serving/parallelism_scaling: TP within a node, pipeline parallel across nodes, on Ray."""
    directory, gpus = shlex.quote(path), max(size for size in sizes if size <= 8)
    apart = " --enable-expert-parallel" if gpus in shares else ""
    yield "one GPU", (f"vllm serve {directory}",)
    if gpus > 1:
        yield f"one node, {gpus} GPUs", (f"vllm serve {directory} --tensor-parallel-size {gpus}{apart}",)
    yield (
        f"two nodes of {gpus} GPUs, over Ray (the files at the same path on each)",
        (
            "ray start --head --port=6379           # on the first node",
            "ray start --address=FIRST_NODE:6379    # on the second",
            f"vllm serve {directory} --tensor-parallel-size {gpus} --pipeline-parallel-size 2{apart} "
            "--distributed-executor-backend ray   # on the first",
        ),
    )


def _sglang_commands(
    path: str, sizes: tuple[int, ...], shares: tuple[int, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """docs.sglang.io/references/multi_node_deployment: TP over all GPUs of all nodes, one command on each node."""
    start = f"python -m sglang.launch_server --model-path {shlex.quote(path)}"
    gpus = max(size for size in sizes if size <= 8)
    yield "one GPU", (start,)
    if gpus > 1:
        yield f"one node, {gpus} GPUs", (f"{start} --tp-size {gpus}{_ep(gpus, shares)}",)
    both = max((size for size in sizes if 1 < size <= 16), default=0)
    if both:
        common = f"{start} --tp-size {both}{_ep(both, shares)} --nnodes 2 --dist-init-addr FIRST_NODE:20000"
        yield (
            f"two nodes of {both // 2} GPU{'s' if both > 2 else ''}",
            (f"{common} --node-rank 0   # on the first", f"{common} --node-rank 1   # on the second"),
        )


def _ep(size: int, shares: tuple[int, ...]) -> str:
    return f" --ep-size {size}" if size in shares else ""
