"""The one table from medium names on the wire to tiers."""

from __future__ import annotations

TIER_OF_MEDIUM = {
    "gpu": "hbm",
    "cpu": "dram",
    "cpu_pinned": "dram",
    "storage": "filesystem",
    "shared_storage": "filesystem",
    "disk": "filesystem",
    "object": "object",
    "object_store": "object",
    "external": "object",
}
TIERS = ("hbm", "dram", "filesystem", "object")


def tier_of(medium: str | None) -> str:
    """The tier of a medium; absent means HBM. An unknown medium is a tier of its own, by its own name, never HBM."""
    if medium is None:
        return "hbm"
    name = medium.strip().lower()
    return TIER_OF_MEDIUM.get(name, name or "unknown")
