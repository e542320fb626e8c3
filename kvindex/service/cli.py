"""The `kvindex` command: a lazy table of sub-commands, and how errors are printed.

Each command is a module with `add_parser(subparsers)`, which adds one parser of the command's name, and
`run(args) -> int`. Only the module of the command that was asked for is imported, so one that is missing or broken
cannot break the others.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import NamedTuple

from kvindex.errors import ConfigError, KvindexError, UsageError


class Command(NamedTuple):
    module: str
    help: str


COMMANDS = {
    "demo": Command("kvindex.demo.cli", "engines, daemon and router in one go: see requests follow their prefix"),
    "daemon": Command("kvindex.service.daemon", "take engines' KV events in, answer where a prefix is"),
    "router": Command("kvindex.router.cli", "reverse proxy for the OpenAI paths that routes by prefix and load"),
    "sim": Command("kvindex.simulator.cli", "an engine without a GPU that speaks vLLM's HTTP and KV events"),
    "record": Command("kvindex.service.record", "capture an engine's raw KV-event frames into a file"),
    "replay": Command("kvindex.service.replay", "feed captures to a fresh index, print publishers and scores"),
    "score": Command("kvindex.service.score", "ask a daemon which endpoints hold a prompt's prefix"),
    "explain": Command("kvindex.service.explain", "ask a daemon, block by block, who has it and if not, why not"),
    "doctor": Command("kvindex.service.doctor", "check an engine and a config; say how to fix what is wrong"),
    "config": Command("kvindex.service.config_cli", "print an example, check a file, print the JSON schema"),
}

EXAMPLES = """\
examples:
  kvindex demo                                      three simulated engines, everything in one go
  kvindex doctor http://127.0.0.1:8000              is this vLLM ready to be indexed?
  kvindex daemon                                    index the vLLM on this host, no config needed
  kvindex config example daemon > node.yaml         a commented config to start from
  kvindex score --model m --prompt "Once upon"      who holds this prefix?

Each command has its own --help. Exit status: 0 fine, 1 it failed, 2 the call or the config is wrong.
"""


def version() -> str:
    try:
        return metadata.version("kvindex")
    except metadata.PackageNotFoundError:
        return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Expected errors are one line on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # gRPC's C core prints failures that it also returns; whoever wants them sets the variable
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return _run(arguments)
    except (ConfigError, UsageError) as error:
        return _fail(error, 2)
    except (KvindexError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # the reader of our output (head, less) left; Python would complain once more when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception, status: int) -> int:
    print(f"kvindex: error: {error}", file=sys.stderr)
    return status


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kvindex",
        description="Where is every KV-cache block of an inference fleet, and which engine should get this request.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvindex {version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    # the command is the first word that is not an option; options before it (--version, --help) take no value
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    module: ModuleType | None = None
    for name, command in COMMANDS.items():
        if name == wanted:
            module = _load(name, command)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.help, add_help=False)
    args = parser.parse_args(arguments)
    if module is None:
        parser.print_help()
        return 2
    return int(module.run(args))


def _load(name: str, command: Command) -> ModuleType:
    try:
        return importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        missing = error.name or "?"
        if command.module == missing or command.module.startswith(f"{missing}."):
            raise KvindexError(f"`kvindex {name}` is not part of this installation (no module {missing})") from None
        raise KvindexError(f"`kvindex {name}` needs the Python package {missing}, which is not installed") from None


if __name__ == "__main__":
    sys.exit(main())
