"""What Prometheus is told by a live coordinator, and that rules and dashboard ask for what there is."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from luthier.client import Client
from luthier.client.errors import NotFound, Unauthenticated
from luthier.v1 import admin_pb2, job_pb2, training_pb2
from tests.support.coordinator_process import CoordinatorProcess

DEPLOY = Path(__file__).parents[3] / "deploy"
Fresh = Callable[..., CoordinatorProcess]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(client: Client) -> Samples:
    address = client.admin.GetStatus(admin_pb2.GetStatusRequest()).coordinator.metrics_address
    text = httpx.get(f"http://{address}/metrics").text
    families = text_string_to_metric_families(text)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for each in families for sample in each.samples}


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


def test_it_counts_what_happens_and_reads_what_is(fresh: Fresh, rows: Path, store_url: str) -> None:
    process = fresh(store_url=store_url, metrics_port="0").start()
    with process.client() as client, process.client("lut_" + "x" * 43) as stranger:
        client.upload_dataset(rows, "rows")
        spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full")
        names = [client.create_job(job_pb2.Job(finetune=spec)).name for _ in range(3)]
        client.jobs.CancelJob(job_pb2.CancelJobRequest(name=names[0]))
        with pytest.raises(NotFound):
            client.get_job("projects/default/jobs/none")
        with pytest.raises(Unauthenticated):
            stranger.get_job(names[0])
        watch = client.watch(names[1])
        next(watch)
        samples = scrape(client)
    create, get, watching = (f"/luthier.v1.JobService/{name}" for name in ("CreateJob", "GetJob", "WatchJob"))
    assert of(samples, "luthier_jobs", state="queued") == 2
    assert of(samples, "luthier_jobs", state="cancelled") == 1
    assert 0 < of(samples, "luthier_queue_oldest_wait_seconds") < 60
    assert of(samples, "luthier_grpc_server_handled_total", method=create, code="OK") == 3
    assert of(samples, "luthier_grpc_server_handled_total", method=get, code="NOT_FOUND") == 1
    assert of(samples, "luthier_grpc_server_handled_total", method=get, code="UNAUTHENTICATED") == 1
    assert of(samples, "luthier_grpc_server_handling_seconds_count", method=create) == 3
    assert of(samples, "luthier_grpc_server_streams", method=watching) == 1
    assert of(samples, "luthier_store_group_size_sum") >= 4
    assert (of(samples, "luthier_store_up"), of(samples, "luthier_ray_up")) == (1, 0)
    assert (of(samples, "luthier_leader"), of(samples, "luthier_leader_epoch")) == (1, 1)
    assert not any(value in names[1] for _, labels in samples for _, value in labels if value.startswith("ft-"))


def test_rules_and_dashboard_ask_for_what_there_is(fresh: Fresh) -> None:
    process = fresh(metrics_port="0").start()
    with process.client() as client:
        address = client.admin.GetStatus(admin_pb2.GetStatusRequest()).coordinator.metrics_address
    known = set()
    for family in text_string_to_metric_families(httpx.get(f"http://{address}/metrics").text):
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        known |= {family.name + ending for ending in endings}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana" / "luthier.json").read_text())
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"\b(?:luthier|process)_[a-z_]+", expression)}
    assert len(names) > 15
    assert names <= known


def test_a_taken_port_is_said_in_one_line_and_without_one_there_are_none(fresh: Fresh) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        process = fresh(metrics_port=str(port)).start(wait=False)
        assert process.process is not None
        assert process.process.wait(20) == 1
    assert f"cannot listen on 127.0.0.1:{port} for metrics" in process.log().splitlines()[-1]
    quiet = fresh().start()
    with quiet.client() as client:
        assert client.admin.GetStatus(admin_pb2.GetStatusRequest()).coordinator.metrics_address == ""
