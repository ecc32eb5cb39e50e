"""What ``GET /v1/guard`` says: which guard is in force, and how."""

from collections.abc import Mapping
from typing import Any

from spider_sense.guard import Detector, Guard
from spider_sense.policy import Policy
from spider_sense.serving.settings import ServingSettings

__all__ = ["about"]


def about(guard: Guard, policy: Policy, settings: ServingSettings, versions: Mapping[str, str]) -> dict[str, Any]:
    """Describe a guard in force, JSON-ready. Nothing that is secret, but thresholds and paths: it is for operators.

    Args:
        guard: in force.
        policy: in force.
        settings: what the server was told.
        versions: of the programs that serve.
    """
    manifest = guard.manifest
    return {
        "guard": {
            "name": settings.guard.name,
            "digest": guard.digest,
            "model": manifest.fingerprint.model_dump(mode="json"),
            "certified": [config.model_dump(mode="json") for config in manifest.certified],
            "sites": sorted({site for probe in guard.probes for site in map(str, probe.maps)}),
            "detectors": [_detector(detector) for detector in manifest.detectors],
        },
        "policy": {"digest": policy.digest, "actions": list(policy.actions), **policy.model_dump(mode="json")},
        "settings": settings.model_dump(mode="json", exclude={"graph", "exempt_principals"}),
        "versions": dict(versions),
    }


def _detector(detector: Detector) -> dict[str, Any]:
    calibration = detector.calibration
    return {
        "name": detector.name,
        "family": detector.family,
        "sites": list(detector.sites),
        "aggregator": detector.aggregator.model_dump(mode="json"),
        "suspect_fpr": calibration.suspect_fpr,
        "breach_fpr": calibration.breach_fpr,
        "thresholds": [
            {"max_tokens": bucket.max_tokens, "suspect": bucket.suspect.value, "breach": bucket.breach.value}
            for bucket in calibration.buckets
        ],
    }
