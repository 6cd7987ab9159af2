"""Publish reports as Prometheus metrics, read back over HTTP as Prometheus would."""

import math
import subprocess
import sys
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from tests.sync.reports import GB, make_engine, make_report

from weightcast.sync.errors import AddressError
from weightcast.sync.fleet import STATES
from weightcast.sync.metrics import PublishMetrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(address: str) -> Samples:
    """Every sample, by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"weightcast_sync_{name}", frozenset(labels.items())]


def series(samples: Samples, label: str) -> set[str]:
    """All values of a label."""
    return {dict(labels)[label] for _, labels in samples if label in dict(labels)}


def test_a_publish_is_counted_and_scraped() -> None:
    metrics = PublishMetrics()
    with metrics.serve(0) as server:
        assert server.address.startswith("127.0.0.1:")
        metrics.observe(make_report(7))
        refused = make_engine("engine-1", state="refused", num_bytes=0, checksums_checked=0, num_repeats=4)
        later = make_report(8, num_bytes=8_000_000, engines=(make_engine("engine-0", pause_s=0.2), refused))
        metrics.observe(later)
        samples = scrape(server.address)
    assert value(samples, "publishes_total") == 2
    assert value(samples, "seconds_count", phase="stage") == 2
    assert value(samples, "seconds_sum", phase="stage") == pytest.approx(0.6)
    assert value(samples, "stall_seconds_sum") == pytest.approx(0.4)
    assert value(samples, "pause_seconds_sum", engine="engine-0") == pytest.approx(0.24)
    assert value(samples, "pause_seconds_count", engine="engine-1") == 1
    assert value(samples, "stage_seconds_sum", engine="engine-0") == pytest.approx(0.5)
    assert value(samples, "bytes_total", transport="zmq", kind="received") == 24_000_000
    assert value(samples, "bytes_total", transport="zmq", kind="dense") == 3 * GB
    assert value(samples, "source_bytes", rank="0", kind="dense") == 600_000_000
    assert value(samples, "source_bytes", rank="1", kind="delta") == 3_000_000
    assert value(samples, "source_pack_seconds", rank="1") == pytest.approx(0.1)
    assert value(samples, "repeats_total") == 4
    assert value(samples, "checksums_total") == 90
    assert value(samples, "density") == 0.008
    assert value(samples, "delta_ratio") == 125
    assert (value(samples, "published_version"), value(samples, "published_epoch")) == (8, 1000)
    assert value(samples, "model_bytes") == GB
    assert {state: value(samples, "engines", state=state) for state in STATES} == {
        state: {"serving": 1.0, "refused": 1.0}.get(state, 0.0) for state in STATES
    }


def test_what_is_not_known_is_not_a_number() -> None:
    metrics = PublishMetrics()
    with metrics.serve(0) as server:
        metrics.observe(make_report(density=None, engines=(), num_bytes=0))
        samples = scrape(server.address)
        assert math.isnan(value(samples, "density")) and math.isnan(value(samples, "delta_ratio"))
        metrics.observe(make_report(8, density=0.0, num_bytes=0, engines=(make_engine("a", num_bytes=0),)))
        assert value(scrape(server.address), "delta_ratio") == math.inf


def test_the_series_of_what_is_gone_end() -> None:
    metrics = PublishMetrics()
    with metrics.serve(0) as server:
        lost = make_engine("silent", state="lost", num_bytes=0, checksums_checked=0)
        metrics.observe(make_report(1, engines=(*make_report().engines, lost)))
        assert series(scrape(server.address), "engine") == {"engine-0", "engine-1", "router"}
        report = make_report(2)
        metrics.observe(replace(report, engines=report.engines[1:2], sources=report.sources[:1]))
        samples = scrape(server.address)
    assert (series(samples, "engine"), series(samples, "rank")) == ({"engine-1"}, {"0"})
    assert value(samples, "bytes_total", transport="zmq", kind="dense") == 3 * GB


def test_registries_are_our_own() -> None:
    mine = CollectorRegistry()
    PublishMetrics(mine).observe(make_report())
    PublishMetrics().observe(make_report())
    assert mine.get_sample_value("weightcast_sync_publishes_total") == 1
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PublishMetrics(mine)


def test_an_address_that_cannot_be_had_is_refused() -> None:
    with PublishMetrics().serve(0) as server:
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(AddressError, match=f"cannot answer Prometheus at 127.0.0.1:{port}: .*choose a free port"):
            PublishMetrics().serve(port)
    with PublishMetrics().serve(port) as again:
        assert scrape(again.address)
    with pytest.raises(AddressError, match="99999"):
        PublishMetrics().serve(99999)


WITHOUT_PROMETHEUS = """
import sys
sys.modules["prometheus_client"] = None  # what an import finds where the package is not installed
import weightcast.sync.metrics as metrics
from weightcast.sync.errors import ConfigError
try:
    metrics.PublishMetrics()
except ConfigError as error:
    print(error)
"""


def test_the_extra_is_named_where_it_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PROMETHEUS], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("install it with `pip install 'weightcast[metrics]'`"), done.stderr
