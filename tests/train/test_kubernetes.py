"""scripts/kubernetes.yaml: its fields exist in JobSet, and its command describes the same pods to every process."""

import copy
import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE_PYTHON = '#!/bin/sh\necho "$TF_CONFIG"\nprintf "%s\\n" "$@"\n'


def closed(schema):
    """A schema that refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {key: closed(part) for key, part in schema.items() if key != "properties"}
    if "properties" not in schema:
        return rest
    properties = {name: closed(part) for name, part in schema["properties"].items()}
    return {"additionalProperties": False, **rest, "properties": properties}


@pytest.fixture(scope="module")
def schema():
    return closed(json.loads((REPOSITORY / "tests/data/jobset-schema.json").read_text(encoding="utf-8")))


@pytest.fixture
def manifest():
    return yaml.safe_load((REPOSITORY / "scripts/kubernetes.yaml").read_text(encoding="utf-8"))


def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(manifest):
    (only,) = job(manifest)["template"]["spec"]["containers"]
    return only


def test_the_manifest_is_a_valid_jobset(manifest, schema):
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(manifest, schema, jsonschema.Draft7Validator)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (["spec", "failurePolicy"], "maxRestarts", "maxRestart"),
        (["spec", "network"], "enableDNSHostnames", "enableDnsHostnames"),
        (["spec", "replicatedJobs", 0, "template", "spec"], "completionMode", "completionmode"),
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0], "args", "arg"),
    ],
)
def test_a_misspelled_field_is_found(manifest, schema, path, old, new):
    wrong = copy.deepcopy(manifest)
    place = wrong
    for step in path:
        place = place[step]
    place[new] = place.pop(old)
    with pytest.raises(jsonschema.ValidationError, match=new):
        jsonschema.validate(wrong, schema, jsonschema.Draft7Validator)


def run_pod(manifest, folder, index):
    """Run the container's command with a `python` that prints; returns TF_CONFIG and the arguments of python."""
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin/python"
    python.write_text(FAKE_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    pod = container(manifest)
    variables = {entry["name"]: entry["value"] for entry in pod["env"] if "value" in entry}
    labels = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in pod["env"] if "value" not in entry
    }
    assert labels == {"JOBSET": "metadata.labels['jobset.sigs.k8s.io/jobset-name']"}  # JobSet sets this label
    variables |= {"JOBSET": manifest["metadata"]["name"], "JOB_COMPLETION_INDEX": str(index)}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [*pod["command"], *pod["args"]]
    assert not re.search(r"\$\(", "".join(command)), "Kubernetes replaces $(NAME) itself"
    answer = subprocess.run(command, cwd=folder, env={**variables, "PATH": path}, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    config, *arguments = answer.stdout.splitlines()
    return json.loads(config), arguments


def test_every_pod_gets_the_same_hosts_and_its_index(manifest, tmp_path):
    name, spec = manifest["metadata"]["name"], job(manifest)
    count = spec["parallelism"]
    assert spec["completions"] == count and spec["completionMode"] == "Indexed"
    pods = [run_pod(manifest, tmp_path, index) for index in range(count)]
    # The pattern of JobSet's documentation: <jobset>-<replicatedJob>-<jobIndex>-<podIndex>.<subdomain>
    subdomain = manifest["spec"]["network"].get("subdomain", name)
    replicated = manifest["spec"]["replicatedJobs"][0]["name"]
    hosts = [f"{name}-{replicated}-0-{index}.{subdomain}" for index in range(count)]
    for index, (config, arguments) in enumerate(pods):
        assert [worker.rpartition(":")[0] for worker in config["cluster"]["worker"]] == hosts
        assert config["cluster"] == pods[0][0]["cluster"]
        assert config["task"] == {"type": "worker", "index": index}
        assert arguments[:2] == ["-m", "pipeline.train"]
        assert {f"name={name}", "cluster=environment", *container(manifest)["args"]} <= set(arguments)


def test_the_settings_are_accepted_and_a_started_run_is_resumed(manifest, tmp_path):
    from pipeline.core import config
    from pipeline.train import cluster
    from pipeline.train.__main__ import OF_A_RESUMED_RUN

    name = manifest["metadata"]["name"]
    settings = config.compose(run_pod(manifest, tmp_path, 0)[1][2:])
    assert (settings.name, settings.resume, settings.cluster) == (name, None, "environment")
    cluster.per_worker_batch(settings.batch_size, job(manifest)["parallelism"])
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / name / "config.yaml").touch()
    again = run_pod(manifest, tmp_path, 0)[1][2:]
    assert config.compose(again).resume == f"runs/{name}"
    assert {argument.partition("=")[0] for argument in again} <= set(OF_A_RESUMED_RUN)
