"""The hub and what came from it: the models known by name, downloads, and checks of what is on the disk."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localmoe.hub.cache import OnProgress, Progress
    from localmoe.hub.download import pull, pull_config, survey
    from localmoe.hub.names import KnownModel, ModelRef, registry
    from localmoe.hub.reports import PulledFile, PullReport, Survey
    from localmoe.hub.verify import Problem, VerifyReport, verify_artifact, verify_source

__all__ = [
    "KnownModel",
    "ModelRef",
    "OnProgress",
    "Problem",
    "Progress",
    "PullReport",
    "PulledFile",
    "Survey",
    "VerifyReport",
    "pull",
    "pull_config",
    "registry",
    "survey",
    "verify_artifact",
    "verify_source",
]

_HOMES = {
    "cache": ("OnProgress", "Progress"),
    "download": ("pull", "pull_config", "survey"),
    "names": ("KnownModel", "ModelRef", "registry"),
    "reports": ("PullReport", "PulledFile", "Survey"),
    "verify": ("Problem", "VerifyReport", "verify_artifact", "verify_source"),
}


def __getattr__(name: str) -> Any:
    """Import on first use: what asks for a model's name does not wait for the code that downloads it."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"localmoe.hub.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
