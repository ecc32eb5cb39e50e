"""The files that operators copy: every metric that they name is one that is counted, every setting one that is read."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from spider_sense.config import parse
from spider_sense.guard import Guard
from spider_sense.models import LoadedModel
from spider_sense.policy import Extraction, Policy
from spider_sense.serving.settings import ENABLED, find_settings

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def labels(tiny_loaded: LoadedModel, guards: Any, tmp_path: Path) -> dict[str, set[str]]:
    """The labels of every sample that the code exposes, by its name."""
    from prometheus_client import REGISTRY

    from spider_sense.serving.prometheus import GuardMetrics

    guards.guard(tiny_loaded, guards.many_probes()[:1]).save_pretrained(tmp_path / "guard")
    watching = Policy.default().model_copy(update={"extraction": Extraction(limit="flag", act="stop")})
    GuardMetrics(Guard.from_pretrained(tmp_path / "guard"), watching, "1.2")
    samples = [sample for family in REGISTRY.collect() for sample in family.samples]
    ours = [sample for sample in samples if re.match("spider_sense_(?!.*_created$)", sample.name)]
    return {sample.name: set(sample.labels) for sample in ours}


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((DOCS / "grafana-dashboard.json").read_text(encoding="utf-8"))
    return read


def kubernetes() -> dict[str, Any]:
    """Return the objects by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((DOCS / "kubernetes.yaml").read_text(encoding="utf-8"))}


def test_the_dashboard_asks_only_for_what_is_counted(labels: dict[str, set[str]]) -> None:
    panels = dashboard()["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [one["query"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]
    named: set[str] = set()
    for expression in asked:
        selectors = re.findall(r"(spider_sense_\w+)(?:\{([^}]*)\})?", expression)
        assert selectors, expression
        grouped = {name for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(", ")}
        for metric, matchers in selectors:
            known = labels[metric] | {"job", "instance"}
            assert set(re.findall(r"(\w+)!?=", matchers)) <= known, expression
            assert grouped <= known, expression
            named.add(metric)
    bases = {re.sub("_(bucket|count|sum)$", "", metric) for metric in labels}
    assert {re.sub("_(bucket|count|sum)$", "", metric) for metric in named} == bases, "a metric that no panel shows"
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_table_in_the_documentation_lists_every_metric(labels: dict[str, set[str]]) -> None:
    rows = re.findall(r"^\| `(spider_sense_\w+)` \|([^|]*)\|", (DOCS / "serving.md").read_text(), re.MULTILINE)
    listed = {name: set(re.findall(r"`(\w+)`", named)) for name, named in rows}
    histograms = {name.removesuffix("_bucket") for name in labels if name.endswith("_bucket")}
    plain = {
        name: found for name, found in labels.items() if re.sub("_(bucket|count|sum)$", "", name) not in histograms
    }
    assert listed == plain | {name: labels[f"{name}_count"] for name in histograms}


def test_the_deployment_is_read_as_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENABLED, raising=False)
    found = kubernetes()
    assert found.keys() == {"ConfigMap", "Deployment", "Service"}
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    config = container["args"][container["args"].index("--additional-config") + 1]
    settings = find_settings(json.loads(config))
    assert settings is not None
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert set(mounts.values()) == volumes.keys()
    assert "persistentVolumeClaim" in volumes[mounts[str(settings.guard)]]
    assert settings.policy is not None
    assert volumes[mounts[str(settings.policy.parent)]]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    policy = parse(yaml.safe_load(found["ConfigMap"]["data"][settings.policy.name]), Policy, origin="kubernetes.yaml")
    assert policy == Policy.default()
    assert settings.audit is not None
    assert str(settings.audit.parent) in mounts
    assert found["Service"]["spec"]["selector"] == pod["metadata"]["labels"]


def test_a_pod_without_a_guard_is_never_ready(labels: dict[str, set[str]]) -> None:
    (container,) = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    *python, script = container["readinessProbe"]["exec"]["command"]
    assert python == ["python3", "-c"]
    assert set(re.findall(r"spider_sense_\w+", script)) <= labels.keys()

    def run(metrics: bytes) -> object:
        served = {"http://127.0.0.1:8000/health": b"", "http://127.0.0.1:8000/metrics": metrics}
        body = script.replace("from urllib.request import urlopen\n", "")
        with pytest.raises(SystemExit) as ended:
            exec(body, {"urlopen": lambda address, timeout: io.BytesIO(served[address])})
        return ended.value.code

    assert run(b'spider_sense_guard_info{guard="c065"} 1.0\n') == 0
    assert run(b"vllm:num_requests_running 0.0\n") == 1
