"""`pull`, `list`, `rm`, `verify`: what is on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe import store
from localmoe.cli import options, streams, units
from localmoe.cli.sanitize import printable_line
from localmoe.errors import VerificationError

if TYPE_CHECKING:
    from localmoe.hub import KnownModel, ModelRef, OnProgress, Progress, PullReport, VerifyReport
    from localmoe.store import Artifact, Resolved

_PULL_KEYS = "name, repo, commit, path, size_bytes, received_bytes, files [{name, size_bytes, state}]"
_LIST_KEYS = (
    "home, models [{name, recipe, path, size_bytes, complete, group_size, version, mean_relative_error}], "
    "known [{name, repo, what, parameters, size_bytes, licence, refused}]"
)
_RM_KEYS = "removed [path]"
_VERIFY_KEYS = "model, path, checked, checked_bytes, unrecorded [file]"


def pull(
    model: options.NamedModel,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="R", help="A branch, tag or commit.  [default: main]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_PULL_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Download MODEL as its makers ship it, and check every file's hash.

    What an interrupted download left is used; what is damaged is fetched again. Honours HF_ENDPOINT, HF_TOKEN,
    HF_HOME and HF_HUB_OFFLINE.
    """
    report = fetch(store.parse_ref(model), revision)
    if as_json:
        record = asdict(report) | {"path": str(report.path), "size_bytes": report.size_bytes}
        streams.write_json(record)
        return
    for name in report.repaired:
        streams.write(f"{printable_line(name)} was damaged and has been fetched again\n")
    received = f"{units.size(report.received_bytes)} received" if report.received_bytes else "nothing to fetch"
    streams.write(
        f"{report.name}: {len(report.files)} files, {units.size(report.size_bytes)}, every hash right, {received}\n"
        f"in {printable_line(report.path)}\n"
        f"next: localmoe quantize {report.name}\n"
    )


def fetch(ref: ModelRef, revision: str | None = None) -> PullReport:
    """Pull with a progress bar. Ctrl-C loses nothing."""
    from localmoe import hub
    from localmoe.cli.render import progress_bar

    try:
        with progress_bar("pull") as advance:
            return hub.pull(ref, revision=revision, progress=_passed_to(advance))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_LIST_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Show the models on this machine, and those that can be pulled by name."""
    from localmoe.hub import registry

    here = [*store.list_artifacts(), *store.list_sources()]
    known = [entry for entry in registry().values() if entry.repo is not None]
    if as_json:
        keys = ("name", "repo", "what", "parameters", "size_bytes", "licence", "refused")
        streams.write_json(
            {
                "home": str(store.home()),
                "models": [asdict(artifact) | {"path": str(artifact.path)} for artifact in here],
                "known": [{key: getattr(entry, key) for key in keys} for entry in known],
            }
        )
        return

    from localmoe.cli.render import table

    rows = [_row(artifact) for artifact in here]
    text = table(("ON THIS MACHINE", "SIZE", "GROUP", "ERROR", ""), rows, ("left", "right", "right", "right", "left"))
    names = [(entry.name, units.size(entry.size_bytes), _about(entry)) for entry in known]
    catalogue = table(("TO PULL BY NAME", "DOWNLOAD", ""), names, ("left", "right", "left"))
    streams.write(f"{text}\n\n{catalogue}\n")


def remove(
    model: options.NamedModel,
    everything: Annotated[bool, typer.Option("--all", help="Delete all artifacts of this name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_RM_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Delete a quantized model from the store. Sources and directories of your own are not touched."""
    removed = store.remove(store.parse_ref(model), all=everything)
    if as_json:
        streams.write_json({"removed": [str(path) for path in removed]})
    else:
        streams.write("".join(f"removed {printable_line(path)}\n" for path in removed))


def verify(
    model: options.Model,
    as_json: Annotated[bool, typer.Option("--json", help=options.json_help(_VERIFY_KEYS))] = False,
    debug: options.Debug = False,
) -> None:
    """Check every file of MODEL against its recorded SHA-256. Exit status 1 when one differs."""
    from localmoe.cli.opening import label
    from localmoe.cli.render import progress_bar

    resolved = store.resolve(model)
    with progress_bar("verify") as advance:
        report = _verified(resolved, _passed_to(advance))
    if not report.ok:
        named = "; ".join(f"{problem.file}: {problem.reason}" for problem in report.problems)
        raise VerificationError(f"{report.path} is damaged: {named}; {_repair(resolved)}")
    if as_json:
        record = asdict(report) | {"model": label(resolved), "path": str(report.path)}
        del record["problems"]  # with one, this is a failure
        streams.write_json(record)
    else:
        unrecorded = f", {len(report.unrecorded)} without a recorded hash" if report.unrecorded else ""
        streams.write(
            f"{label(resolved)}: {report.checked} files, {units.size(report.checked_bytes)}, "
            f"every hash right{unrecorded}\n"
        )


def _verified(resolved: Resolved, progress: OnProgress) -> VerifyReport:
    from localmoe import hub

    check = hub.verify_artifact if resolved.kind == "artifact" else hub.verify_source
    return check(resolved.path, progress=progress)


def _repair(resolved: Resolved) -> str:
    if resolved.ref.directory is not None:
        return "copy or make it again"
    if resolved.kind == "source":
        return f"localmoe pull {resolved.name} repairs it"
    name = f"{resolved.name}:{resolved.recipe}"
    return f"localmoe rm {name}, then localmoe quantize {resolved.name} --recipe {resolved.recipe}"


def _about(known: KnownModel) -> str:
    return f"{known.parameters}: {known.what}" if known.refused is None else f"not supported: {known.refused}"


def _row(artifact: Artifact) -> tuple[str, str, str, str, str]:
    error = artifact.mean_relative_error
    return (
        f"{artifact.name}:{artifact.recipe}",
        units.size(artifact.size_bytes),
        str(artifact.group_size or ""),
        f"{error:.4f}" if error is not None else "",
        "" if artifact.complete else "unfinished: the same quantize command goes on",
    )


def _passed_to(advance: Any) -> OnProgress:
    def report(progress: Progress) -> None:
        advance(progress.done_bytes, progress.total_bytes, progress.item)

    return report
