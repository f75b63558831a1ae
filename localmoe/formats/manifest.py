"""`localmoe.json`: what an artifact was made from, how, what it holds, and what the rounding cost.

It is written last, so a directory that has one is complete. No time stamps and no paths: the same source
and settings give the same bytes. Importing this module does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from localmoe.errors import CheckpointError

MANIFEST_NAME = "localmoe.json"
FORMAT = 1
"""Version of the manifest's and the artifact's layout; a reader refuses what it does not know."""

CONVERTED = "converted"
"""What stands for a recipe where others packed the source, whose numbers are kept."""

_LARGEST = 256 * 2**20  # bytes; V3's, with 45,000 matrices, has about 4 MB
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,254}")


@dataclass(frozen=True)
class Settings:
    """What the user chose; one output directory holds the result of one choice."""

    recipe: str
    group_size: int
    grid: str
    method: str = "rtn"
    calibration: str | None = None
    """SHA-256 of the calibration text, where there was one."""

    def __str__(self) -> str:
        plain = f"{self.recipe}, groups of {self.group_size}, {self.grid} grid"
        if self.calibration is None:
            return plain
        return f"{plain}, {self.method} calibrated on {self.calibration[:12]}"


@dataclass(frozen=True)
class FileRecord:
    """One file's content: SHA-256 in hex, and size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """The checkpoint that was read; hub name and revision where they are known."""

    name: str | None
    revision: str | None
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class TensorRecord:
    """One quantized matrix: `scheme` such as `int4-g32`, and ||w - w'|| / ||w|| in Frobenius norms."""

    scheme: str
    relative_error: float
    method: str | None = None
    tokens: int | None = None
    output_error: float | None = None
    """Of a calibrated matrix: `gptq`, `weighted` or `mse`; the calibration tokens that reached it; and
    ||X (W - W')|| / ||X W|| over them."""


@dataclass(frozen=True)
class Totals:
    """The tensors of all shards together, scales included."""

    parameters: int
    bytes: int
    bits_per_weight: float
    relative_error: float


@dataclass(frozen=True)
class Measured:
    """What the artifact loses, on `tokens` predicted tokens of a held-out text: perplexities, and the KL divergence to
    the source in nats a token. An `_error` is a standard error. None: not known (a source that was not kept)."""

    text_sha256: str
    tokens: int
    perplexity: float
    perplexity_error: float | None
    reference_perplexity: float | None
    reference_perplexity_error: float | None
    kld_mean: float | None
    kld_error: float | None
    kld_median: float | None
    kld_p90: float | None
    kld_p99: float | None
    kld_max: float | None
    same_top1: float | None


@dataclass(frozen=True)
class Manifest:
    """Everything in `localmoe.json`. `notes` are sentences for the user, such as what stays unquantized; `measured` is
    None where the loss was not measured."""

    localmoe: str
    settings: Settings
    source: Source
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]
    totals: Totals
    notes: tuple[str, ...]
    measured: Measured | None = None

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, one line a value, no NaN."""
        value = asdict(self) | asdict(self.settings) | {"format": FORMAT}
        del value["settings"]
        if self.settings.calibration is None:  # nothing to say of it
            del value["method"], value["calibration"]
        if self.measured is None:
            del value["measured"]
        for entry in value["tensors"].values():
            for name in ("method", "tokens", "output_error"):
                if entry[name] is None:
                    del entry[name]
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Parse and check a directory's manifest. Raises CheckpointError naming the file and the field."""
        path = directory / MANIFEST_NAME
        try:
            if path.stat().st_size > _LARGEST:
                raise CheckpointError(f"{path}: larger than any manifest localmoe writes")
            value = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); quantize the model again") from error
        return _Reader(path).manifest(value)


@dataclass(frozen=True)
class _Reader:
    """Takes untrusted JSON apart; every refusal names the file and the field."""

    path: Path

    def manifest(self, value: object) -> Manifest:
        top = self.mapping("the manifest", value)
        if top.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path}: format {str(top.get('format'))[:20]!r} is not {FORMAT}, which this version reads; "
                "quantize the model again, or update localmoe"
            )
        source = self.mapping("source", top.get("source"))
        return Manifest(
            localmoe=self.text("localmoe", top.get("localmoe")),
            settings=Settings(
                recipe=self.text("recipe", top.get("recipe")),
                group_size=self.count("group_size", top.get("group_size")),
                grid=self.text("grid", top.get("grid")),
                method=self.text("method", top.get("method", "rtn")),
                calibration=self.optional_text("calibration", top.get("calibration")),
            ),
            source=Source(
                name=self.optional_text("source.name", source.get("name")),
                revision=self.optional_text("source.revision", source.get("revision")),
                files=self.files("source.files", source.get("files")),
            ),
            files=self.files("files", top.get("files")),
            tensors={
                name: self.tensor(name, entry) for name, entry in self.mapping("tensors", top.get("tensors")).items()
            },
            totals=self.totals(top.get("totals")),
            notes=self.notes(top.get("notes")),
            measured=None if top.get("measured") is None else self.measured(top["measured"]),
        )

    def wrong(self, field: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {field[:100]} is missing or malformed; quantize the model again")

    def mapping(self, field: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(field)
        return value

    def text(self, field: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
            raise self.wrong(field)
        return value

    def optional_text(self, field: str, value: object) -> str | None:
        return None if value is None else self.text(field, value)

    def count(self, field: str, value: object) -> int:
        if type(value) is not int or value < 0:
            raise self.wrong(field)
        return value

    def number(self, field: str, value: object) -> float:
        if type(value) not in (int, float) or not 0 <= value < float("inf"):  # type: ignore[operator]
            raise self.wrong(field)
        return float(value)  # type: ignore[arg-type]

    def files(self, field: str, value: object) -> dict[str, FileRecord]:
        records = {}
        for name, entry in self.mapping(field, value).items():
            record = self.mapping(f"{field}.{name}", entry)
            digest = self.text(f"{field}.{name}.sha256", record.get("sha256"))
            if not _FILE_NAME.fullmatch(name) or not _SHA256.fullmatch(digest):
                raise self.wrong(f"{field}.{name!a}")
            records[name] = FileRecord(digest, self.count(f"{field}.{name}.bytes", record.get("bytes")))
        return records

    def tensor(self, name: str, value: object) -> TensorRecord:
        entry = self.mapping(f"tensors.{name}", value)
        return TensorRecord(
            self.text(f"tensors.{name}.scheme", entry.get("scheme")),
            self.number(f"tensors.{name}.relative_error", entry.get("relative_error")),
            self.optional_text(f"tensors.{name}.method", entry.get("method")),
            None if entry.get("tokens") is None else self.count(f"tensors.{name}.tokens", entry["tokens"]),
            None
            if entry.get("output_error") is None
            else self.number(f"tensors.{name}.output_error", entry["output_error"]),
        )

    def totals(self, value: object) -> Totals:
        entry = self.mapping("totals", value)
        return Totals(
            parameters=self.count("totals.parameters", entry.get("parameters")),
            bytes=self.count("totals.bytes", entry.get("bytes")),
            **{field.name: self.number(f"totals.{field.name}", entry.get(field.name)) for field in fields(Totals)[2:]},
        )

    def measured(self, value: object) -> Measured:
        entry = self.mapping("measured", value)
        figures = [field.name for field in fields(Measured)[3:]]
        return Measured(
            self.text("measured.text_sha256", entry.get("text_sha256")),
            self.count("measured.tokens", entry.get("tokens")),
            self.number("measured.perplexity", entry.get("perplexity")),
            **{
                name: None if entry.get(name) is None else self.number(f"measured.{name}", entry[name])
                for name in figures
            },
        )

    def notes(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise self.wrong("notes")
        return tuple(self.text("notes", note) for note in value)
