"""Alerts, runbook and dashboard: each alert is told what to do about, and each metric that is asked for exists."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from services.registry import domain_metrics
from services.trainer import training_metrics

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "deploy/observability"
ALERTS = yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())["groups"][0]["rules"]
TRIALS = yaml.safe_load((OBSERVABILITY / "alerts.test.yaml").read_text())["tests"]
PANELS = json.loads((OBSERVABILITY / "grafana/dashboards/tiltyard.json").read_text())["panels"]
QUERIES = [rule["expr"] for rule in ALERTS] + [target["expr"] for panel in PANELS for target in panel["targets"]]

UNITS = {"s": "_seconds", "By": "_bytes", "/s": "_per_second", "": ""}
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def declared() -> Iterator[tuple[str, str, str]]:
    """Kind, name and unit of every instrument in the code."""
    for package in ("services", "tiltyard"):
        for module in (ROOT / package).rglob("*.py"):
            text = module.read_text()
            if "metrics." not in text:
                continue
            for call in ast.walk(ast.parse(text)):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr in SUFFIXES
                    and isinstance(call.func.value, ast.Name)
                    and call.func.value.id == "metrics"
                ):
                    unit = next(word.value for word in call.keywords if word.arg == "unit")
                    yield call.func.attr, ast.literal_eval(call.args[0]), ast.literal_eval(unit)


def in_prometheus() -> set[str]:
    """What the collector's Prometheus exporter calls them, and what Prometheus says of its own rules."""
    return {"ALERTS"} | {
        name.replace(".", "_") + UNITS[re.sub(r"\{.*?\}", "", unit)] + suffix
        for kind, name, unit in declared()
        for suffix in SUFFIXES[kind]
    }


def asked_for(query: str) -> set[str]:
    names = r"\b(?:ALERTS|(?:tiltyard|rpc|process|system)_[a-z_]+)(?=[\[{) ]|$)"
    return set(re.findall(names, re.sub(r"\{.*?\}", "", query))) - set(
        re.findall(r"[a-z_]+", " ".join(re.findall(r"by \((.*?)\)", query)))
    )


def test_each_alert_has_a_section_in_the_runbook_and_no_other() -> None:
    sections = re.findall(r"^## (.+)$", (ROOT / "docs/runbook.md").read_text(), flags=re.MULTILINE)
    assert sections == [rule["alert"] for rule in ALERTS]
    assert len(set(sections)) == len(sections)


def test_each_alert_says_how_urgent_it_is_and_what_is_the_matter() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].endswith(".")


def test_each_alert_is_tried_on_what_it_is_for_and_on_an_arena_where_all_is_well() -> None:
    tried = {(each["alertname"], bool(each.get("exp_alerts"))) for trial in TRIALS for each in trial["alert_rule_test"]}
    assert tried == {(rule["alert"], fires) for rule in ALERTS for fires in (True, False)}
    series = {line["series"] for trial in TRIALS for line in trial["input_series"]}
    assert {each.partition("{")[0] for each in series} <= in_prometheus()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool (it comes with Prometheus)")
@pytest.mark.parametrize(
    "asked", ["check rules alerts.yaml", "test rules alerts.test.yaml", "check config prometheus.yaml"]
)
def test_prometheus_takes_the_alerts_and_finds_them_where_they_should_be(asked: str) -> None:
    syntax = ["--syntax-only"] if "config" in asked else []  # the rules lie elsewhere in its container
    done = subprocess.run(
        ["promtool", *asked.split(), *syntax], cwd=OBSERVABILITY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("query", QUERIES)
def test_each_metric_that_is_asked_for_exists(query: str) -> None:
    wanted = asked_for(query)
    assert wanted
    assert wanted <= in_prometheus()


def test_what_an_alert_counts_up_is_told_from_zero_on() -> None:
    increases = {name for rule in ALERTS for name in re.findall(r"increase\((\w+)_total", rule["expr"])}
    told = {each.name.replace(".", "_"): each for each in (training_metrics.DEATHS, domain_metrics.FAULTS)}
    assert increases == told.keys()
    assert all(each.sums() for each in told.values())


def test_what_an_alert_counts_up_has_a_panel() -> None:
    shown = set[str]().union(*(asked_for(target["expr"]) for panel in PANELS for target in panel["targets"]))
    assert {name for rule in ALERTS for name in re.findall(r"increase\((\w+)", rule["expr"])} <= shown


def test_no_two_panels_are_in_one_place() -> None:
    places = [tuple(panel["gridPos"][each] for each in "xywh") for panel in PANELS]
    assert len(set(places)) == len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_a_metric_that_nobody_declares_would_be_found_out() -> None:
    assert not asked_for("sum(rate(tiltyard_nonsense_total[5m]))") <= in_prometheus()


def test_the_collector_takes_both_signals() -> None:
    config = yaml.safe_load((OBSERVABILITY / "collector.yaml").read_text())
    pipelines = config["service"]["pipelines"]
    for pipeline in pipelines.values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= set(config[part])
    assert set(pipelines) == {"traces", "metrics"}
    scraped = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"][0].endswith(config["exporters"]["prometheus"]["endpoint"][-5:])
