"""HTTP/1.1 as far as a router needs it: what is refused, what is forwarded, and heads as bytes. Pure functions.

llhttp (through httptools, strict) already refuses Content-Length beside Transfer-Encoding, a second Content-Length,
bare CR or LF, folded headers and spaces before a colon. What it lets pass and a router must not is refused here.
Framing is never copied: both sides' heads get the framing that we ourselves send, so the two ends cannot disagree
about it.
"""

from __future__ import annotations

import http
from typing import NamedTuple

import msgspec

Headers = list[tuple[bytes, bytes]]  # names in lower case

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_NOT_UPSTREAM = HOP_BY_HOP | {b"content-length", b"expect", b"x-kvindex-explain"}
_NOT_DOWNSTREAM = HOP_BY_HOP | {b"content-length"}
_OURS = b"x-kvindex-"
_LOOK_AT = frozenset((b"host", b"transfer-encoding", b"content-length", b"connection", b"expect"))

REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus}


class Refusal(NamedTuple):
    """Why a request is not served. `reason` is a slug for metrics, `message` is for people."""

    status: int
    reason: str
    message: str


class Framing(NamedTuple):
    """What a request's head says about its body and its connection."""

    content_length: int | None
    chunked: bool
    expects_continue: bool
    dropped: frozenset[bytes]  # headers that `Connection` names: hop by hop too


def request_framing(headers: Headers, version: str) -> Framing | Refusal:
    """Check a request's head as a whole."""
    hosts = 0
    length: int | None = None
    codings: list[bytes] = []
    expects = False
    dropped: frozenset[bytes] = frozenset()
    for name, value in headers:
        if name not in _LOOK_AT:
            continue
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            if length is not None or not value.isdigit():
                return Refusal(400, "bad_framing", "Content-Length must be given once, as digits")
            length = int(value)
        elif name == b"transfer-encoding":
            codings.append(value.strip().lower())
        elif name == b"connection":
            dropped |= {token.strip() for token in value.lower().split(b",")} - {b"close", b"keep-alive", b""}
        elif value.strip().lower() != b"100-continue":
            return Refusal(417, "bad_expect", "only `Expect: 100-continue` is understood")
        else:
            expects = version == "1.1"
    if version not in ("1.1", "1.0"):
        return Refusal(505, "bad_version", f"HTTP/{version} is not spoken here, HTTP/1.1 is")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return Refusal(400, "bad_host", "exactly one Host header is needed")
    if codings:
        if length is not None or version == "1.0":
            return Refusal(400, "bad_framing", "Transfer-Encoding with Content-Length, or in HTTP/1.0, is ambiguous")
        if codings != [b"chunked"]:
            return Refusal(501, "bad_framing", "the only Transfer-Encoding understood is `chunked`")
    return Framing(length, bool(codings), expects, dropped)


def upstream_head(
    method: bytes, target: bytes, headers: Headers, dropped: frozenset[bytes], length: int | None, extra: bytes
) -> bytes:
    """The head sent to an engine. `extra` is whole header lines. `length` None: the request has no body."""
    parts = [b"%b %b HTTP/1.1\r\n" % (method, target)]
    for name, value in headers:
        if name not in _NOT_UPSTREAM and name not in dropped:
            parts.append(b"%b: %b\r\n" % (name, value))
    if length is not None:
        parts.append(b"content-length: %d\r\n" % length)
    parts.append(extra)
    parts.append(b"\r\n")
    return b"".join(parts)


def downstream_head(status: int, reason: bytes, headers: Headers, framing: bytes, extra: bytes) -> bytes:
    """The head sent to a client: the engine's own headers, then ours. `framing` and `extra` are whole header lines."""
    dropped: frozenset[bytes] = frozenset()
    for name, value in headers:
        if name == b"connection":
            dropped |= {token.strip() for token in value.lower().split(b",")}
    parts = [b"HTTP/1.1 %d %b\r\n" % (status, reason)]
    for name, value in headers:
        if name not in _NOT_DOWNSTREAM and not name.startswith(_OURS) and name not in dropped:
            parts.append(b"%b: %b\r\n" % (name, value))
    parts.append(framing)
    parts.append(extra)
    parts.append(b"\r\n")
    return b"".join(parts)


def own_answer(
    status: int,
    body: bytes,
    *,
    content_type: bytes = b"application/json",
    extra: bytes = b"",
    keep_alive: bool = True,
    head_only: bool = False,
) -> bytes:
    """A whole answer made by the router itself."""
    head = (
        b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n"
        % (status, REASONS[status], content_type, len(body))
        + extra
        + (b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
    )
    return head if head_only else head + body


def error_body(status: int, reason: str, message: str, **details: object) -> bytes:
    """The JSON of an error, in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "router_error"
    return msgspec.json.encode({"error": {"message": message, "type": kind, "code": reason, "param": None, **details}})
