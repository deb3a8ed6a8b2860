"""The alert rules and the dashboard ask for metrics and labels that a server has.

What a server has is read off vLLM's own Prometheus logger, made for a tiny model with an MTP draft and two engines.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from test_platform import engine_config
from tiny_checkpoint import write_random
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_dsa import metrics

EXAMPLES = Path(__file__).parents[1] / "examples"
ALERTS = yaml.safe_load((EXAMPLES / "prometheus" / "alerts.yaml").read_text())
DASHBOARD = json.loads((EXAMPLES / "grafana" / "dashboard.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = {"$__rate_interval": "5m", "$model": ".+", "$instance": ".+"}
SCRAPED = {"job", "instance"}  # what Prometheus adds


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Metric -> labels, of what a server would expose."""
    folder, found = tmp_path_factory.mktemp("random"), {}
    write_random(folder, num_hidden_layers=1)
    config = engine_config(folder, speculative_config={"method": "mtp", "num_speculative_tokens": 2})
    PrometheusStatLogger(config, [0, 1]).log_engine_initialized()
    for family in text_string_to_metric_families(prometheus_client.generate_latest().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    yield found
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
def test_an_alert_asks_for_what_a_server_exposes(rule, known):
    assert faults(rule["expr"], known) == []
    # What its texts show must be left after aggregation.
    shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    assert shown <= _labels(promql.parse(rule["expr"]), known)
    assert set(rule["annotations"]) == {"summary", "description"}
    assert rule["labels"]["severity"] in ("info", "warning", "critical")


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[f"{t} {x['refId']}" for t, x in TARGETS])
def test_a_panel_asks_for_what_a_server_exposes(title, target, known):
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
def test_a_wrong_expression_is_seen(expression, says, known):
    assert any(says in fault for fault in faults(expression, known))
