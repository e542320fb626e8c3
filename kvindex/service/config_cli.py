"""`kvindex config example|check|schema KIND`: the same three for every config file that there is."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any, NamedTuple

import msgspec

from kvindex.errors import KvindexError
from kvindex.service import yamlfile


class Kind(NamedTuple):
    """Where a file's Struct and its commented example are; imported only when asked for."""

    module: str
    struct: str
    example_module: str
    example: str


KINDS = {
    "daemon": Kind("kvindex.service.config", "NodeConfig", "kvindex.service.config_example", "NODE"),
    "router": Kind("kvindex.router.config", "RouterConfig", "kvindex.router.config", "EXAMPLE"),
}

EXAMPLES = """\
examples:
  kvindex config example daemon > node.yaml
  kvindex config check daemon node.yaml
  kvindex config schema router > router.schema.json   for editors that complete and check YAML
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "config",
        help="print an example, check a file, print the JSON schema",
        description="Examples, checks and schemas of the config files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="example|check|schema", required=True)
    for verb, text in (
        ("example", "print a commented YAML with every field"),
        ("check", "decode a file; exit status 2 and the field's path when something is wrong"),
        ("schema", "print the JSON schema"),
    ):
        sub = verbs.add_parser(verb, help=text, description=text)
        sub.add_argument("kind", choices=list(KINDS))
        if verb == "check":
            sub.add_argument("file")
            sub.add_argument("--json", action="store_true", help="print the decoded config, defaults filled in")


def run(args: argparse.Namespace) -> int:
    kind = KINDS[args.kind]
    if args.verb == "example":
        print(_attribute(args.kind, kind.example_module, kind.example), end="")
        return 0
    struct = _attribute(args.kind, kind.module, kind.struct)
    if args.verb == "schema":
        print(json.dumps(msgspec.json.schema(struct), indent=2))
        return 0
    config = yamlfile.load(args.file, struct)
    if args.json:
        plain = msgspec.to_builtins(config)
        if plain.get("token"):
            plain["token"] = "***"
        print(json.dumps(plain, indent=2, default=sorted))
    else:
        print(f"{args.file}: ok")
    return 0


def _attribute(name: str, module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError):
        raise KvindexError(f"the {name} is not part of this installation (no {module}.{attribute})") from None
