"""The engines that the oracle plays: layouts of KV-cache groups, wire forms and namespaces, as one table.

Imports nothing but the standard library, because both sides read it: the oracle (in vLLM's environment) to build the
engines, the property test (in ours) to name its cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bound = Literal["exact", "at_most", "mostly"]
GroupKind = Literal["full", "mla", "window", "mamba", "chunked"]

STATE_UNIT = "a state can be held at hit lengths that no block and no announced boundary names"
SPARSE_WINDOWS = "only window groups at retention 0: nothing dense to align the sparse hashes with"
CHUNK_SIZE = "the chunk size of chunked-local attention is not announced"
MEDIA_END = "where a medium ends inside a larger block is not announced: finer chains past it are not known"
REPORT_FULL = "cached blocks are announced again with every hit: not always to be told from a second copy"


@dataclass(frozen=True)
class Group:
    """One KV-cache group. `span` is the window of a sliding window, or the chunk of chunked-local attention."""

    kind: GroupKind
    block_size: int
    span: int | None = None


@dataclass(frozen=True)
class Layout:
    """One engine. `retention` is vLLM's prefix_cache_retention_interval (its default is 0, None keeps everything).

    `unit` is vLLM's prefix_match_unit: hashes finer than every block. `bound` says what can be asked of an index that
    has seen every message: the engine's own answer, or only never more than that, or that mostly, and then `why`.
    """

    name: str
    groups: tuple[Group, ...]
    retention: int | None = 0
    unit: int | None = None
    wire: Literal["map", "array"] = "map"
    hashes: Literal["int", "bytes"] = "int"
    lora: bool = False
    salt: bool = False
    media: bool = False
    ranks: int = 1
    eagle: bool = False
    report_full: bool = False
    bound: Bound = "exact"
    why: str = ""


def _full(block_size: int) -> Group:
    return Group("full", block_size)


def _window(block_size: int, window: int) -> Group:
    return Group("window", block_size, window)


def _mamba(block_size: int) -> Group:
    return Group("mamba", block_size)


_PLAIN = (
    Layout("full-16", (_full(16),)),
    Layout("full-32", (_full(32),)),
    Layout("mla-64", (Group("mla", 64),)),
    Layout("full-16-twice", (_full(16), _full(16))),
    Layout("full-16-full-32", (_full(16), _full(32))),
)

_WINDOWS = (
    Layout("full-16-window-64", (_full(16), _window(16, 64))),
    Layout("full-16-window-64-dense", (_full(16), _window(16, 64)), retention=None),
    Layout("full-16-window-64-interval", (_full(16), _window(16, 64)), retention=128),
    Layout("full-16-window-40", (_full(16), _window(16, 40))),
    Layout("full-16-window-8", (_full(16), _window(16, 8))),
    Layout("full-16-window-17-dense", (_full(16), _window(16, 17)), retention=None),
    Layout("full-32-window-128-three-groups", (_window(32, 128), _full(32), _window(32, 128), _window(32, 128))),
    Layout("full-16-windows-32-64-100", (_full(16), _window(16, 32), _window(16, 64), _window(16, 100))),
    Layout("full-16-windows-32-100-dense", (_full(16), _window(16, 32), _window(16, 100)), retention=None),
    Layout("full-64-window-128-by-16", (_full(64), _window(16, 128))),
    Layout("full-64-window-128-by-16-dense", (_full(64), _window(16, 128)), retention=None),
    Layout("full-16-window-128-by-64", (_full(16), _window(64, 128))),
    Layout("full-16-window-128-by-64-dense", (_full(16), _window(64, 128)), retention=None),
    Layout("full-32-window-96-by-48", (_full(32), _window(48, 96))),
    Layout("full-32-windows-64-by-16-and-128-by-64", (_full(32), _window(16, 64), _window(64, 128))),
)

_ONLY_WINDOWS = (
    Layout("window-64", (_window(16, 64),), bound="at_most", why=SPARSE_WINDOWS),
    Layout("window-64-dense", (_window(16, 64),), retention=None),
    Layout("windows-32-64", (_window(16, 32), _window(16, 64)), bound="at_most", why=SPARSE_WINDOWS),
    Layout("windows-32-64-dense", (_window(16, 32), _window(16, 64)), retention=None),
)

_STATES = (
    Layout("full-32-mamba-32", (_full(32), _mamba(32))),
    Layout("full-32-mamba-32-dense", (_full(32), _mamba(32)), retention=None),
    Layout("full-16-mamba-64", (_full(16), _mamba(64))),
    Layout("full-16-mamba-64-dense", (_full(16), _mamba(64)), retention=None),
    Layout("full-16-two-mamba-48", (_full(16), _mamba(48), _mamba(48))),
    Layout("full-64-mamba-16", (_full(64), _mamba(16))),
    Layout("full-16-mamba-64-window-64", (_full(16), _mamba(64), _window(16, 64))),
    Layout("full-32-mamba-64-window-128-by-64", (_full(32), _mamba(64), _window(64, 128))),
    Layout("full-64-mamba-64-unit-16", (_full(64), _mamba(64)), unit=16, bound="at_most", why=STATE_UNIT),
    Layout("full-32-mamba-64-unit-16", (_full(32), _mamba(64)), unit=16, bound="at_most", why=STATE_UNIT),
    Layout("full-64-mamba-64-unit-16-dense", (_full(64), _mamba(64)), None, 16, bound="at_most", why=STATE_UNIT),
)

_LOCAL = (
    Layout("full-16-chunked-64", (_full(16), Group("chunked", 16, 64)), bound="at_most", why=CHUNK_SIZE),
    Layout("chunked-64", (Group("chunked", 16, 64),), bound="at_most", why=CHUNK_SIZE),
)

_NAMESPACES = (
    Layout("full-16-lora", (_full(16),), lora=True),
    Layout("full-16-salt", (_full(16),), salt=True),
    Layout("full-16-media", (_full(16),), media=True),
    Layout("full-16-lora-salt-media", (_full(16),), lora=True, salt=True, media=True),
    Layout("full-16-window-64-lora-salt", (_full(16), _window(16, 64)), lora=True, salt=True),
    Layout(
        "full-64-window-128-by-16-media",
        (_full(64), _window(16, 128)),
        salt=True,
        media=True,
        bound="at_most",
        why=MEDIA_END,
    ),
    Layout("full-16-mamba-64-lora-salt-media", (_full(16), _mamba(64)), lora=True, salt=True, media=True),
)

_RANKS = (
    Layout("full-16-two-ranks", (_full(16),), ranks=2),
    Layout("full-16-window-64-two-ranks", (_full(16), _window(16, 64)), ranks=2),
)

_WIRE = (
    Layout("full-16-array", (_full(16),), wire="array"),
    Layout("full-16-lora-salt-array", (_full(16),), wire="array", lora=True, salt=True),
    Layout("full-16-windows-32-64-array", (_full(16), _window(16, 32), _window(16, 64)), wire="array"),
    Layout("full-64-window-128-by-16-array", (_full(64), _window(16, 128)), wire="array"),
    Layout("full-16-mamba-64-array", (_full(16), _mamba(64)), wire="array"),
    Layout("full-16-bytes", (_full(16),), hashes="bytes"),
    Layout("full-16-window-64-bytes-two-ranks", (_full(16), _window(16, 64)), hashes="bytes", ranks=2),
)

_EAGLE = (
    Layout("full-16-eagle", (_full(16),), eagle=True),
    Layout("full-16-window-64-eagle", (_full(16), _window(16, 64)), eagle=True),
    Layout("full-16-window-64-eagle-dense", (_full(16), _window(16, 64)), eagle=True, retention=None),
)

_REPORTS = (
    Layout("full-16-report-full", (_full(16),), report_full=True, bound="mostly", why=REPORT_FULL),
    Layout(
        "full-16-window-64-report-full",
        (_full(16), _window(16, 64)),
        report_full=True,
        bound="mostly",
        why=REPORT_FULL,
    ),
)

ALL = _PLAIN + _WINDOWS + _ONLY_WINDOWS + _STATES + _LOCAL + _NAMESPACES + _RANKS + _WIRE + _EAGLE + _REPORTS
LAYOUTS = {layout.name: layout for layout in ALL}


def chosen(names: str) -> list[Layout]:
    """The layouts of a comma-separated list, or all of them."""
    if names == "all":
        return list(ALL)
    unknown = [name for name in names.split(",") if name not in LAYOUTS]
    if unknown:
        raise SystemExit(f"no such layout: {', '.join(unknown)}; known: {', '.join(LAYOUTS)}")
    return [LAYOUTS[name] for name in names.split(",")]
