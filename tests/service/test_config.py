"""node.yaml: what is refused, how it is said, and that the printed example is true."""

from __future__ import annotations

import json
import pathlib

import msgspec
import pytest

from kvindex.errors import ConfigError
from kvindex.service import cli, config, yamlfile
from kvindex.service.config import NodeConfig
from kvindex.service.config_example import NODE


def test_example_decodes_to_the_defaults() -> None:
    decoded = yamlfile.decode(NODE, NodeConfig)
    assert msgspec.structs.replace(decoded, engines=()) == NodeConfig()
    assert decoded.all_engines[0].url == config.DEFAULT_ENGINE


def test_example_names_every_field() -> None:
    def fields(struct: type) -> set[str]:
        return {f.encode_name for f in msgspec.structs.fields(struct)}

    known = fields(NodeConfig) | fields(config.PublisherConfig) - {"key_domain"} | fields(config.Tls)
    missing = {name for name in known if f"{name}:" not in NODE}
    assert not missing


def test_commented_parts_of_the_example_are_valid_too() -> None:
    starts = ("#  - ", "#    ", "#publishers_file", "#tls", "#  my-model")
    uncommented = [line[1:] if line.startswith(starts) else line for line in NODE.splitlines()]
    text = "\n".join(uncommented).replace("publishers: []", "publishers:").replace("tokenizers: {}", "tokenizers:")
    decoded = yamlfile.decode(text, NodeConfig)
    assert decoded.publishers[0].replay == "tcp://10.0.0.8:5657"
    assert decoded.tokenizers == {"my-model": "/models/my-model"}
    assert decoded.tls is not None


def test_nothing_configured_means_the_engine_on_this_host() -> None:
    (engine,) = NodeConfig().all_engines
    assert (engine.url, engine.fallback) == ("http://127.0.0.1:8000", "tcp://127.0.0.1:5557")
    assert NodeConfig(publishers=(config.PublisherConfig("tcp://h:1"),)).all_engines == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lisen: {}", "lisen: unknown field; did you mean `listen`? known: listen, tls, "),
        ("listen: {grcp: a}", "listen.grcp: unknown field; did you mean `grpc`? known: grpc, http"),
        ("listen: {grpc: nowhere}", "listen.grpc: 'nowhere' is not host:port"),
        ("listen: {grpc: '::1:80'}", "listen.grpc: '::1:80': write an IPv6 address in brackets, [::1]:80"),
        ("listen: {http: 'h:99999'}", "listen.http: 'h:99999' is not host:port"),
        (
            "listen: {http: '0.0.0.0:9151'}",
            "listen.http: 0.0.0.0:9151 can be reached from other hosts, and neither tls",
        ),
        ("tls: {cert: a}", "tls.key: is required and missing"),
        ("publishers: [{source: tcp://h:1}, {source: h:2}]", "publishers[1].source: 'h:2' is not tcp://host:port"),
        ("publishers: [{source: 'tcp://*:1'}]", "publishers[0].source: 'tcp://*:1' names no host to connect to"),
        ("log: {level: warn}", "log.level: 'warn' is not allowed; did you mean `warning`? known: debug, info, warning"),
        ("publishers: [{source: tcp://h:1, offload_chunk_tokens: 0}]", "publishers[0].offload_chunk_tokens: "),
        (
            "publishers: [{source: tcp://h:1}, {source: tcp://h:1}]",
            "publishers[1]: source tcp://h:1 is already publishers[0]",
        ),
        ("publishers: [{}]", "publishers[0].source: is required and missing"),
        ("engines: [localhost:8000]", "engines[0]: 'localhost:8000' is not http://host:port"),
        ("engines: [{url: 'h:1'}]", "engines[0].url: 'h:1' is not http://host:port"),
        ("engines: [{uri: 'h:1'}]", "engines[0].uri: unknown field; did you mean `url`?"),
        ("tokenizers: {m: 3}", "tokenizers.m: expected str, got int (3)"),
        ("index: {weights: {hbm: 1.0, dram: high}}", "index.weights.dram: expected float, got str ('high')"),
        ("index: {on_lost_messages: ignore}", "index.on_lost_messages: 'ignore' is not allowed; "),
        ("index: {cost: {tiers: {dram: {latency: 1}}}}", "index.cost.tiers.dram.latency: unknown field; did you mean"),
        ("queue: {max_messages: 0}", "queue.max_messages: expected int >= 1 (0)"),
        ("probe_interval_seconds: 0", "probe_interval_seconds: expected float > 0"),
        ("token: a\ntoken_file: b", "token_file: is set, and so is token; keep one of them"),
        ("token: a\ntoken: b", "line 2, column 1: not valid YAML: `token` is given twice"),
        ("listen: [", "line 1, column 10: not valid YAML: "),
        ("- 1", "top level: expected object, got array"),
        ("publishers: 3", "publishers: expected array, got int (3)"),
    ],
)
def test_errors_name_the_field_and_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        yamlfile.decode(text, NodeConfig)
    assert str(caught.value).startswith(message)


def test_insecure_listeners_must_be_asked_for() -> None:
    for more in ("allow_insecure: true", "token: t", "tls: {cert: c, key: k}"):
        assert yamlfile.decode(f"listen: {{grpc: '0.0.0.0:1'}}\n{more}", NodeConfig).listen.grpc == "0.0.0.0:1"


def test_paths_are_relative_to_the_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("tls: {cert: c.pem, key: /k.pem}\ntokenizers: {m: models/m}\npublishers_file: p.yaml\n")
    loaded = config.load(str(file))
    assert loaded.tls == config.Tls(str(tmp_path / "c.pem"), "/k.pem")
    assert loaded.tokenizers == {"m": str(tmp_path / "models/m")}
    assert loaded.publishers_file == str(tmp_path / "p.yaml")


def test_token_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    assert config.read_token(None, str(file)) == "s3cret"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="token_file: must be printable ASCII and not empty"):
        config.read_token(None, str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        config.read_token(None, str(tmp_path / "absent"))


def test_command_prints_example_check_and_schema(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "example", "daemon"]) == 0
    file = tmp_path / "node.yaml"
    file.write_text(capsys.readouterr().out)
    assert cli.main(["config", "check", "daemon", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: ok\n"
    assert cli.main(["config", "check", "daemon", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["listen"]["grpc"] == "127.0.0.1:50151"
    assert cli.main(["config", "schema", "daemon"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["NodeConfig"]["additionalProperties"] is False


def test_check_reports_with_status_2(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("lisen: {}")
    assert cli.main(["config", "check", "daemon", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"kvindex: error: {file}: lisen: unknown field; did you mean `listen`?")
    assert cli.main(["config", "check", "daemon", str(tmp_path / "absent")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
