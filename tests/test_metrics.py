"""vllm_dsa_info, and that the alert rules and the dashboard ask for metrics and labels that a server has.

What a server has is read off vLLM's own Prometheus logger, made for a tiny model with an MTP draft and two engines.
"""

import json
import re
import urllib.request
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import prometheus_client
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from test_platform import engine_config
from tiny_checkpoint import build_prompt, write_planted
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_dsa import __version__, metrics
from vllm_dsa.testing.server import Server, serve

EXAMPLES = Path(__file__).parents[1] / "examples"
ALERTS = yaml.safe_load((EXAMPLES / "prometheus" / "alerts.yaml").read_text())
DASHBOARD = json.loads((EXAMPLES / "grafana" / "dashboard.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {"$__rate_interval": "5m", "$model": ".+", "$instance": ".+"}
SCRAPED = {"job", "instance"}  # what Prometheus adds
MTP = {"method": "mtp", "num_speculative_tokens": 2}
DSA = dict(version=__version__, cache="float32", index_bytes="132", index_topk="16", latent_bytes="2304")
ON_CPU = dict(write="cpu", select="cpu", attend="cpu")


def parsed(text: str) -> dict[str, set[str]]:
    """Metric -> labels, of what /metrics returns."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def info(text: str) -> list[dict[str, str]]:
    """Labels of every sample of vllm_dsa_info."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families[metrics.NAME].samples if metrics.NAME in families else []
    assert all(sample.value == 1 for sample in samples)
    return [sample.labels for sample in samples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False)
    return path


@pytest.fixture(scope="module")
def exposed(folder):
    """What a server would expose: text, as Prometheus scrapes it."""
    config = engine_config(folder, served_model_name=["tiny"], speculative_config=MTP)
    PrometheusStatLogger(config, [0, 1]).log_engine_initialized()
    yield prometheus_client.generate_latest().decode()
    unregister_vllm_metrics()


def faults(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What is wrong with an expression, a line a fault; ``known`` is metric -> labels."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    try:
        return list(_faults(promql.parse(expression), known))
    except ValueError as error:
        return [f"no PromQL: {error}"]


def _children(node: Any) -> list[Any]:
    if isinstance(node, promql.Call):
        return list(node.args)
    if isinstance(node, promql.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql.MatrixSelector):
        return [node.vector_selector]
    return [node.expr] if hasattr(node, "expr") else []


def _labels(node: Any, known: dict[str, set[str]]) -> set[str]:
    """Labels of an expression's result."""
    if isinstance(node, promql.VectorSelector):
        return known.get(node.name, set()) | SCRAPED
    if isinstance(node, promql.AggregateExpr):
        return set(node.modifier.labels) if node.modifier else set()
    if isinstance(node, promql.BinaryExpr):
        scalar = isinstance(node.lhs, promql.NumberLiteral)
        return _labels(node.rhs if scalar else node.lhs, known)
    return set().union(*(_labels(child, known) for child in _children(node)))


def _faults(node: Any, known: dict[str, set[str]]) -> Iterator[str]:
    if isinstance(node, promql.VectorSelector):
        if node.name not in known:
            yield f"no metric {node.name}"
        else:
            lacking = {matcher.name for matcher in node.matchers.matchers} - _labels(node, known)
            yield from (f"{node.name} has no label {label}" for label in sorted(lacking))
    if isinstance(node, promql.AggregateExpr) and node.modifier:
        lacking = set(node.modifier.labels) - _labels(node.expr, known)
        yield from (f"no label {label} to aggregate by in {node.expr}" for label in sorted(lacking))
    if isinstance(node, promql.Call) and node.func.name == "rate":
        name = node.args[0].vector_selector.name
        if not name.endswith(("_total", "_bucket", "_count", "_sum")):
            yield f"rate of {name}, which is no counter"
    for child in _children(node):
        yield from _faults(child, known)


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_asks_for_what_a_server_exposes(rule, exposed):
    known = parsed(exposed)
    assert faults(rule["expr"], known) == []
    # What its texts show must be left after aggregation.
    shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    assert shown <= _labels(promql.parse(rule["expr"]), known)
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["labels"]["severity"] in ("info", "warning", "critical")


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[f"{t} {x['refId']}" for t, x in TARGETS])
def test_a_panel_asks_for_what_a_server_exposes(title, target, exposed):
    known = parsed(exposed)
    assert faults(target["expr"], known) == []
    assert target["expr"].count("{") == target["expr"].count('{model_name=~"$model", instance=~"$instance"}')
    expression = target["expr"].replace("$__rate_interval", "5m")
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    assert shown <= _labels(promql.parse(expression), known)
    assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_they_watch_what_matters():
    for texts in (json.dumps(ALERTS), json.dumps([target["expr"] for _, target in TARGETS])):
        for name in (
            "vllm_dsa_info",
            "vllm:kv_cache_usage_perc",
            "vllm:num_preemptions_total",
            "vllm:prefix_cache_hits_total",
            "vllm:spec_decode_num_accepted_tokens_total",
            "vllm:time_to_first_token_seconds_bucket",
            "vllm:inter_token_latency_seconds_bucket",
        ):
            assert name in texts


def test_alerts_and_panels_are_told_apart():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_dashboards_variables_ask_the_info_metric():
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "instance"}
    for name in ("model", "instance"):
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variables[name]["query"]["query"]).groups()
        assert selector.startswith(metrics.NAME) and label in {*metrics.LABELS, *SCRAPED}


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("vllm:kv_cache_usage > 0.9", "no metric vllm:kv_cache_usage"),
        ("rate(vllm:num_preemptions[5m])", "no metric vllm:num_preemptions"),
        ("rate(vllm:kv_cache_usage_perc[5m])", "which is no counter"),
        ('vllm:kv_cache_usage_perc{modelname="x"}', "has no label modelname"),
        ("sum by (model) (vllm:num_requests_running)", "no label model to aggregate by"),
        ("sum(rate(vllm:num_preemptions_total))", "no PromQL"),
        ("vllm:num_requests_running >", "no PromQL"),
        ('1 - (vllm_dsa_info{provider="cpu"} or vllm:no)', "has no label provider"),
    ],
)
def test_a_wrong_expression_is_seen(expression, says, exposed):
    assert any(says in fault for fault in faults(expression, parsed(exposed)))


def test_info_says_what_serves(exposed):
    assert [labels for labels in info(exposed) if labels["model_name"] == "tiny"] == [
        {"model_name": "tiny", **DSA, **ON_CPU}
    ]


@pytest.mark.parametrize(
    ("env", "options", "changed"),
    [
        ("VLLM_DSA_PROVIDER=reference", {}, dict.fromkeys(("write", "select", "attend"), "reference")),
        ("VLLM_DSA_DENSE=1", {}, dict.fromkeys(("select", "attend"), "dense")),
        (None, dict(kv_cache_dtype="fp8"), dict(cache="fp8_ds_mla", latent_bytes="656")),
        (None, dict(dtype="bfloat16", kv_cache_dtype="bfloat16"), dict(cache="bfloat16", latent_bytes="1152")),
        (None, dict(hf_overrides={"index_topk": 48}), dict(index_topk="48")),
    ],
)
def test_info_follows_the_config(folder, monkeypatch, env, options, changed):
    if env:
        monkeypatch.setenv(*env.split("="))
    name = f"model {env} {options}"
    engine_config(folder, served_model_name=name, **options)
    (labels,) = (x for x in info(prometheus_client.generate_latest().decode()) if x["model_name"] == name)
    assert labels == {"model_name": name, **DSA, **ON_CPU, **changed}


def test_it_is_no_stat_logger():
    """One would have vLLM gather statistics of every model, whatever --disable-log-stats says."""
    groups = {entry.group for entry in distribution("vllm-dsa").entry_points}
    assert "vllm.general_plugins" in groups and "vllm.stat_logger_plugins" not in groups


def scraped(server: Server) -> str:
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as reply:
        return reply.read().decode()


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.parametrize("options", [(), ("--api-server-count=2",), ("--disable-log-stats",)], ids=str)
def test_a_server_shows_it(folder, options):
    """Also with several API servers, which collect theirs from files; and --disable-log-stats stays what it is."""
    speculation = ("--speculative-config", json.dumps(MTP), "--served-model-name=tiny", "--max-model-len=2048")
    options = ("--dtype=float32", *options)
    with serve(folder, *speculation, *options) as running:
        body = json.dumps({"model": "tiny", "prompt": build_prompt(400, 1).text, "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"{running.base_url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=120).close()
        text = scraped(running)
    known = parsed(text)
    (labels,) = info(text)
    labels.pop("pid", None)
    assert labels == {"model_name": "tiny", **DSA, **ON_CPU}
    if "--disable-log-stats" in options:
        assert not [name for name in known if name.startswith("vllm:")]
    else:
        for expression in (*(rule["expr"] for rule in RULES), *(target["expr"] for _, target in TARGETS)):
            assert faults(expression, known) == []
