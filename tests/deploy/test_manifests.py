"""What is in `deploy/` fits what the daemon reads."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import yaml

from kvindex.service import config

DEPLOY = pathlib.Path(__file__).resolve().parents[2] / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all((DEPLOY / name).read_text()) if d]


@pytest.mark.parametrize("name", ["sidecar.yaml", "daemonset.yaml"])
def test_the_config_map_is_a_valid_node_config(name: str, tmp_path: pathlib.Path) -> None:
    maps = [d for d in documents(name) if d["kind"] == "ConfigMap"]
    assert len(maps) == 1
    path = tmp_path / "node.yaml"
    path.write_text(maps[0]["data"]["node.yaml"])
    loaded = config.load(str(path))
    assert loaded.token_file == "/run/secrets/kvindex/token"


@pytest.mark.parametrize("name", ["sidecar.yaml", "daemonset.yaml"])
def test_the_container_mounts_what_its_config_names(name: str) -> None:
    workload = next(d for d in documents(name) if d["kind"] in ("Deployment", "DaemonSet"))
    container = next(c for c in workload["spec"]["template"]["spec"]["containers"] if c["name"] == "kvindex")
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"] for v in workload["spec"]["template"]["spec"]["volumes"]}
    assert set(mounts.values()) <= volumes
    assert {"/etc/kvindex", "/run/secrets/kvindex"} <= mounts.keys()
    assert container["args"] == ["daemon", "-c", "/etc/kvindex/node.yaml"]
    assert {p["containerPort"] for p in container["ports"]} == {50151, 9151}


def test_the_container_file_copies_what_the_build_needs() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for needed in ("pyproject.toml", "setup.py", "constraints.txt", "proto", "cython_ext", "kvindex"):
        assert needed in text
