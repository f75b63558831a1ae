"""A model that is not on this machine yet: what it takes is shown, the user asked once, and the rest done."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localmoe import store
from localmoe.cli import streams, units
from localmoe.cli.sanitize import printable_line
from localmoe.errors import ModelNotFoundError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from localmoe.cli.options import Machine
    from localmoe.cli.render import Advance
    from localmoe.hub import ModelRef, Survey
    from localmoe.offload.machine import Machine as Speeds
    from localmoe.offload.plan import Plan
    from quantize.arriving import Progress


@dataclass(frozen=True)
class _Wanted:
    """What a first run would do. `quantized_bytes` is 0 where the files run as their makers ship them; `made_bytes` are
    on the disk already."""

    name: str
    recipe: str | None
    survey: Survey
    quantized_bytes: int
    made_bytes: int
    speeds: Speeds
    plan: Plan

    @property
    def verb(self) -> str:
        """What is done with the files for `recipe`."""
        return "convert" if self.recipe == store.CONVERTED else "quantize"

    def disks(self) -> list[tuple[Path, int, int]]:
        """(a place on it, bytes needed, bytes free) of each disk."""
        found: dict[int, tuple[Path, int, int]] = {}
        to_make = max(0, self.quantized_bytes - self.made_bytes)
        for place, needed in ((self.survey.directory, self.survey.missing_bytes), (store.home(), to_make)):
            there = next(path for path in (place, *place.parents) if path.exists())
            first, before, _ = found.get(there.stat().st_dev, (place, 0, 0))
            found[there.stat().st_dev] = (first, before + needed, shutil.disk_usage(there).free)
        return list(found.values())


def bring(model: str, machine: Machine, error: ModelNotFoundError, *, yes: bool) -> None:
    """Download `model`, of which `error` says that it is not here, and quantize what has come meanwhile; to finish that
    is `opening.locate`'s next step.

    Raises `error` for what no hub has and where nobody can be asked, StorageError and DeviceError, before anything is
    downloaded, for a disk or a memory too small, and what `hub.pull` raises.
    """
    from localmoe import hub
    from localmoe.hub.names import repo_of

    ref = store.parse_ref(model)
    if ref.directory is not None or repo_of(ref.name) is None:
        raise error
    asks = streams.is_terminal(sys.stdin) and streams.is_terminal(sys.stderr)
    if not (yes or asks):
        raise ModelNotFoundError(f"{error}; or add -y, which does both")
    recipe = None if ref.ending == "source" else ref.ending or "balanced"
    try:
        streams.passing_remark(f"asking the hub about {ref.name} ...")
        wanted = _reckon(ref, recipe, hub.survey(ref), machine)
    finally:
        streams.passing_remark("")
    _check_space(wanted)
    streams.tell(_text(wanted))
    if not (yes or wanted.survey.begun or _agreed(wanted)):
        raise ModelNotFoundError(f"{ref.name} was not downloaded")

    _fetch(ref, wanted.recipe)


def _reckon(ref: ModelRef, recipe: str | None, survey: Survey, machine: Machine) -> _Wanted:
    from localmoe.cli.plan import forecast

    subject, speeds, plan, made = forecast(survey.config, recipe, machine)
    if made is None:
        return _Wanted(ref.name, None, survey, 0, 0, speeds, plan)
    if made != recipe and ref.ending is not None:
        raise UsageError(f"{ref.name} is quantized already and can only be converted; leave out :{ref.ending}")
    there = store.unfinished_bytes(store.artifact_dir(ref.name, made))
    # A conversion keeps the bits, and only the files say which matrices are packed
    nbytes = survey.size_bytes if made == store.CONVERTED else subject.sizes.nbytes
    return _Wanted(ref.name, made, survey, nbytes, there, speeds, plan)


def _fetch(ref: ModelRef, recipe: str | None) -> None:
    """Pull with a progress bar and, for a `recipe`, quantize what comes shard by shard. Ctrl-C loses nothing."""
    from localmoe.cli.render import progress_bar
    from localmoe.hub.download import pull_weights, pull_without_weights

    try:
        with progress_bar("pull") as advance:
            found = pull_without_weights(ref)
            if recipe is not None:
                from quantize.arriving import comes_in_parts, quantize_arriving

                if comes_in_parts(found):
                    output = store.artifact_dir(ref.name, recipe)
                    quantize_arriving(found, output, recipe, progress=_told(advance))
                    return
            pull_weights(found, progress=lambda step: advance(step.done_bytes, step.total_bytes, step.item))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None


def _told(advance: Advance) -> Callable[[Progress], None]:
    """The pull's bytes and, beside them, how much is quantized; once all is here, the quantization's own."""

    def report(step: Progress) -> None:
        if step.pulled_bytes < step.pull_bytes:
            share = f"{step.quantized_bytes / step.quantize_bytes:.0%} quantized" if step.quantize_bytes else step.item
            advance(step.pulled_bytes, step.pull_bytes, share)
        elif step.quantize_bytes:
            advance(step.quantized_bytes, step.quantize_bytes, step.item, "quantize")

    return report


def _check_space(wanted: _Wanted) -> None:
    """Raises StorageError, with the numbers, where the download and the quantized model do not fit their disks."""
    survey, home = wanted.survey, store.home()
    for place, needed, free in wanted.disks():
        if needed > free:
            parts = f"{units.size(survey.missing_bytes)} more for the download in {survey.directory}"
            if wanted.quantized_bytes:
                parts += f" and {units.size(wanted.quantized_bytes)} for the quantized model in {home}"
            raise StorageError(
                f"{wanted.name} needs {parts}, and the disk of {place} has {units.size(free)} free: free some space, "
                "or set HF_HOME and LOCALMOE_HOME to a bigger disk"
            )


def _text(wanted: _Wanted) -> str:
    survey, placement, speed = wanted.survey, wanted.plan.placement, wanted.plan.decode
    there = survey.size_bytes - survey.missing_bytes
    begun = f", {units.size(there)} of it is here already" if survey.begun else ""
    where = f"the CPU, {units.counted(wanted.speeds.cpu.threads, 'thread')}"
    if wanted.speeds.gpu is not None:
        where = f"{wanted.speeds.gpu.name} beside {where}"
    origin = wanted.speeds.cpu.read.origin
    by = "by what localmoe doctor measured" if origin == "cached" else "assumed; localmoe doctor measures this machine"
    rows = [("download", f"{units.size(survey.size_bytes)} from {survey.repo} to {survey.directory}{begun}")]
    if wanted.recipe is not None:
        output = store.artifact_dir(wanted.name, wanted.recipe)
        made = f", {units.size(wanted.made_bytes)} of it is made already" if wanted.made_bytes else ""
        rows.append((wanted.verb, f"to {units.size(wanted.quantized_bytes)} ({wanted.recipe}) in {output}{made}"))
    disks = [f"{units.size(needed)} of {units.size(free)} free" for _, needed, free in wanted.disks() if needed]
    rows += [
        ("disk", ", ".join(disks)),
        ("runs on", f"{where}, with a context of {placement.context:,} tokens"),
        ("memory", units.size(placement.nbytes("ram")) + _on_disk(placement.experts_on_disk)),
        ("speed", f"about {units.rate(speed.tokens_per_second)}, bound by {speed.bound} ({by})"),
    ]
    lines = [f"{wanted.name} is not on this machine yet", *(f"  {name:<9} {what}" for name, what in rows if what)]
    return "\n".join(streams.in_words(printable_line(line), indent=12 * line.startswith(" ")) for line in lines)


def _on_disk(nbytes: int) -> str:
    return f"; {units.size(nbytes)} of the experts stay on the disk" if nbytes else ""


def _agreed(wanted: _Wanted) -> bool:
    """Ask once; Enter agrees. The end of the input is a no."""
    streams.tell(f"Download{f' and {wanted.verb}' if wanted.recipe else ''} it? [Y/n]", end=" ")
    answer = sys.stdin.readline()
    if not answer:
        streams.tell("")
    return bool(answer) and answer.strip().lower() in ("", "y", "yes")
