"""TLS and the token, on both listeners."""

from __future__ import annotations

import pathlib
import ssl
import subprocess
from urllib.error import URLError

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvindex.errors import ConfigError, ServiceError
from kvindex.service import auth
from kvindex.service.client import IndexClient
from kvindex.service.config import Tls
from tests.service.process import Daemon

pytestmark = pytest.mark.e2e

BOUND = {"publishers": [{"source": "tcp://127.0.0.1:0", "bind": True}]}


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def certificate(folder: pathlib.Path, name: str, issuer: str) -> None:
    key, request, signed = (str(folder / f"{name}.{suffix}") for suffix in ("key", "csr", "pem"))
    openssl("req", *EC_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    extensions = folder / f"{name}.ext"
    extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    signer = ("-CA", str(folder / f"{issuer}.pem"), "-CAkey", str(folder / f"{issuer}.key"), "-CAcreateserial")
    openssl("x509", "-req", "-in", request, *signer, "-days", "1", "-extfile", str(extensions), "-out", signed)


def authority(folder: pathlib.Path, name: str) -> None:
    key, out = str(folder / f"{name}.key"), str(folder / f"{name}.pem")
    openssl("req", "-x509", *EC_KEY, "-days", "1", "-keyout", key, "-out", out, "-subj", f"/CN={name}")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("pki")
    for ca in ("ca", "strangers"):
        authority(folder, ca)
    certificate(folder, "server", "ca")
    certificate(folder, "client", "ca")
    certificate(folder, "stranger", "strangers")
    return folder


def pem(pki: pathlib.Path, name: str) -> str:
    return str(pki / name)


def test_a_token_is_asked_for_and_probes_go_without(tmp_path: pathlib.Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    with Daemon(tmp_path, {**BOUND, "token_file": "token"}) as daemon:
        with daemon.client(token="s3cret") as client:
            assert client.score([1] * 16).endpoints == []
            assert client.endpoints().protocol == 1
        for token in (None, "another", "s3cret "):
            with (
                daemon.client(token=token) as client,
                pytest.raises(ServiceError, match="UNAUTHENTICATED: this server wants"),
            ):
                client.score([1] * 16)
        with grpc.insecure_channel(daemon.grpc) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status
            stream = channel.stream_stream("/kvindex.v1.IndexService/ScoreStream")
            with pytest.raises(grpc.RpcError) as refused:
                next(stream(iter([b""]), timeout=5))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert daemon.get("/healthz").status == 200
        assert daemon.get("/readyz").status in (200, 503)
        assert daemon.get("/metrics").status == 401
        assert daemon.get("/metrics", token="wrong").status == 401
        assert daemon.get("/metrics", token="s3cret").status == 200
        assert daemon.get("/v1/feedback", body={"observations": []}).status == 401


def test_tls(pki: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tls = {"cert": pem(pki, "server.pem"), "key": pem(pki, "server.key")}
    with Daemon(tmp_path, {**BOUND, "tls": tls}, scheme="https") as daemon:
        with daemon.client(ca=pem(pki, "ca.pem")) as client:
            assert client.score([1] * 16).endpoints == []
        with daemon.client(ca=pem(pki, "strangers.pem"), timeout=2) as client, pytest.raises(ServiceError):
            client.score([1] * 16)
        with daemon.client(timeout=2) as client, pytest.raises(ServiceError, match="UNAVAILABLE"):
            client.score([1] * 16)
        trusting = ssl.create_default_context(cafile=pem(pki, "ca.pem"))
        assert daemon.get("/metrics", context=trusting).status == 200
        with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
            daemon.get("/metrics")


def test_client_certificates(pki: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tls = {"cert": pem(pki, "server.pem"), "key": pem(pki, "server.key"), "client_ca": pem(pki, "ca.pem")}
    ca = pem(pki, "ca.pem")
    with Daemon(tmp_path, {**BOUND, "tls": tls, "token": "t"}, scheme="https") as daemon:
        with daemon.client(ca=ca, cert=pem(pki, "client.pem"), key=pem(pki, "client.key"), token="t") as client:
            assert client.score([1] * 16).endpoints == []
        with daemon.client(ca=ca, token="t", timeout=2) as client, pytest.raises(ServiceError):
            client.score([1] * 16)
        stranger = {"cert": pem(pki, "stranger.pem"), "key": pem(pki, "stranger.key")}
        with daemon.client(ca=ca, token="t", timeout=2, **stranger) as client, pytest.raises(ServiceError):
            client.score([1] * 16)
        context = ssl.create_default_context(cafile=ca)
        assert daemon.get("/healthz", context=context).status == 200
        assert daemon.get("/metrics", context=context, token="t").status == 401
        context.load_cert_chain(pem(pki, "client.pem"), pem(pki, "client.key"))
        assert daemon.get("/metrics", context=context).status == 401
        assert daemon.get("/metrics", context=context, token="t").status == 200


def test_other_hosts_without_tls_or_token_is_said_loudly(tmp_path: pathlib.Path) -> None:
    body = {**BOUND, "listen": {"grpc": "0.0.0.0:0", "http": "127.0.0.1:0"}, "allow_insecure": True}
    with Daemon(tmp_path, body) as daemon:
        warning = daemon.wait_log("no tls and no token: whoever reaches this address can ask and read along")
        assert warning["level"] == "warning"
        assert warning["listen"] == "0.0.0.0:0"
    with Daemon(tmp_path, {**body, "token": "t", "allow_insecure": False}) as daemon:
        assert daemon.wait_log("the token crosses the network in clear text: set tls too")["listen"] == "0.0.0.0:0"


def test_wrong_files_are_named(pki: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"tls: .*server.pem and .*client.key are not a certificate and its key"):
        auth.server_credentials(Tls(pem(pki, "server.pem"), pem(pki, "client.key")))
    with pytest.raises(ConfigError, match=r"tls\.cert: nowhere cannot be read: No such file"):
        auth.ssl_context(Tls("nowhere", pem(pki, "client.key")))
    with pytest.raises(ConfigError, match=r"tls\.client_ca: .*server.key holds no certificates"):
        auth.ssl_context(Tls(pem(pki, "server.pem"), pem(pki, "server.key"), pem(pki, "server.key")))
    with pytest.raises(ConfigError, match="cert, key: one of them is missing"):
        IndexClient("127.0.0.1:1", ca=pem(pki, "ca.pem"), cert=pem(pki, "client.pem"))
    with pytest.raises(ConfigError, match="ca: nowhere cannot be read"):
        IndexClient("127.0.0.1:1", ca="nowhere")
