"""From MODEL to an engine: find it, quantize it first where that is asked for, load it."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
from typing import TYPE_CHECKING

from localmoe import store
from localmoe.cli import streams
from localmoe.errors import LocalMoeError, ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from localmoe.cli.options import Machine
    from localmoe.engine import Engine
    from localmoe.offload.counts import ExpertCounts
    from localmoe.store import Resolved


def open_engine(model: str, machine: Machine, *, yes: bool = False) -> tuple[Resolved, Engine]:
    """The model and its engine, which the caller closes. Says on standard error what takes time."""
    resolved = find(model, machine, yes=yes)
    return resolved, open_found(resolved, machine)


def find(model: str, machine: Machine, *, yes: bool = False) -> Resolved:
    """As `locate`, but what is not here is downloaded first if the user, asked or by `yes`, agrees."""
    try:
        return locate(model)
    except ModelNotFoundError as error:
        from localmoe.cli.first_run import bring

        bring(model, machine, error, yes=yes)
        return locate(model, announced=True)


def open_found(resolved: Resolved, machine: Machine) -> Engine:
    """The engine of a model that was found."""
    streams.passing_remark(f"loading {label(resolved)} ...")
    try:
        with nothing_collected():
            engine = load_engine(resolved.path, machine)
    finally:
        streams.passing_remark("")
    if engine.reads_the_disk:
        with contextlib.suppress(LocalMoeError):  # the model is open: that its speed is not known is no failure
            _tell_what_the_disk_costs(resolved, machine)
    return engine


def _tell_what_the_disk_costs(resolved: Resolved, machine: Machine) -> None:
    """Say what to expect of a model that is larger than memory, which is slow, and why."""
    from localmoe.cli.plan import forecast

    subject, speeds, plan, _ = forecast(resolved.path / "config.json", None, machine)
    total = sum(layer.experts for layer in subject.sizes.layers)
    disk = speeds.disk
    by = "as localmoe doctor measured" if disk.origin == "cached" else "assumed; localmoe doctor measures it"
    if plan.placement.disk_experts:
        streams.remark(
            f"{label(resolved)} is larger than the memory it may use: {plan.placement.disk_experts:,} of {total:,} "
            f"experts wait on the disk; about {plan.decode.tokens_per_second:.2g} tokens/s, if that reads "
            f"{disk.value / 1e9:.2g} GB/s ({by})"
        )


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """No search for garbage while torch and the model come, of which none is: one pass over torch's objects takes a
    tenth of a second. Later passes leave out what was there after the first model; a second one's is looked at."""
    gc.disable()
    try:
        yield
        if not gc.get_freeze_count():
            gc.freeze()
            atexit.register(gc.unfreeze)  # at the end the extension is taken down as ever
    finally:
        gc.enable()


def load_engine(path: Path, machine: Machine, counts: ExpertCounts | None = None) -> Engine:
    """The only place where the command line meets torch; tests put their own engine here."""
    from localmoe.load import load

    return load(
        path,
        device=machine.device,
        kernels=machine.kernels,
        threads=machine.threads,
        vram=machine.vram,
        ram=machine.ram,
        ctx=machine.context,
        cache_dtype=machine.cache_dtype,
        mtp=machine.mtp,
        deterministic=machine.deterministic,
        counts=counts,
    )


def locate(model: str, *, announced: bool = False) -> Resolved:
    """The model on this machine. A name that is here only as a source is quantized first, with the recipe its
    ending names (`balanced` without one); `:source`, a directory and what is int4 already stay as they are.
    `announced`: the user knows that it will be quantized."""
    ref = store.parse_ref(model)
    recipe = ref.ending or "balanced"
    if ref.directory is not None or recipe == "source":
        return store.resolve(model)
    try:
        resolved = store.resolve(model)
    except ModelNotFoundError:
        source = store.find_source(ref.name)
        if source is None:
            raise
    else:
        if resolved.kind == "artifact" or _is_packed(resolved.path):
            return resolved
        source = resolved.path
    if ref.ending is None and packed_by_others(source):
        recipe = store.CONVERTED
    elif recipe == store.CONVERTED and not packed_by_others(source):
        raise UsageError(f"{ref.name} was not quantized by others, so nothing is to be converted; leave out :converted")
    _quantize_first(ref.name, recipe, source, announced)
    return store.resolve(model)


def label(resolved: Resolved) -> str:
    """The model as the user would type it."""
    if resolved.ref.directory is not None:
        return str(resolved.ref.directory)
    return f"{resolved.name}:{resolved.recipe or 'source'}"


def packed_by_others(source: Path) -> bool:
    """Whether a source was quantized by others, in another layout: then it can only be converted.

    Raises UnsupportedModelError for one that cannot.
    """
    from localmoe.text.files import read_json_object
    from quantize.foreign import form_of

    return form_of(read_json_object(source / "config.json")) is not None


def _is_packed(path: Path) -> bool:
    """Whether a source is 4-bit in our layout as its makers ship it, so that there is nothing to quantize."""
    try:
        config = json.loads((path / "config.json").read_bytes()).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # quantizing it will say what is wrong
    ours = isinstance(config, dict) and config.get("quant_method") == "compressed-tensors"
    return ours and not packed_by_others(path)


def _quantize_first(name: str, recipe: str, source: Path, announced: bool) -> None:
    from localmoe.cli.quantize import make_artifact

    output = store.artifact_dir(name, recipe)
    if announced:
        pass
    elif store.unfinished_bytes(output):
        streams.tell(streams.in_words(f"{name}:{recipe} is quantized in part: finishing it"))
    else:
        said = f"{name} is here but not quantized yet: quantizing it with the recipe {recipe} (once)"
        streams.tell(streams.in_words(said))
    make_artifact(source, output, recipe)
    streams.tell(streams.in_words(f"quantized to {output}"))
