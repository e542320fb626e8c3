"""What `kvindex doctor` finds: one line a check, and how to fix it."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """`about` is an engine's URL or a config's name; `fix` says what to do, and is empty when all is well."""

    about: str
    check: str
    level: Level
    text: str
    fix: str = ""


class Findings:
    """Collects what the checks of one subject say."""

    def __init__(self, about: str) -> None:
        self.about = about
        self.all: list[Finding] = []

    def ok(self, check: str, text: str) -> None:
        self.all.append(Finding(self.about, check, "ok", text))

    def warning(self, check: str, text: str, fix: str) -> None:
        self.all.append(Finding(self.about, check, "warning", text, fix))

    def error(self, check: str, text: str, fix: str) -> None:
        self.all.append(Finding(self.about, check, "error", text, fix))
