"""The hub and what came from it: the models known by name, downloads, and checks of what is on the disk."""

from localmoe.hub.cache import OnProgress, Progress
from localmoe.hub.download import PulledFile, PullReport, Survey, pull, pull_config, survey
from localmoe.hub.names import KnownModel, ModelRef, registry
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
