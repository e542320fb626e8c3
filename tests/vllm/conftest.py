"""The environment of a real vLLM, or a skip that says how to get it (a failure where everything must run)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of vLLM's environment."""
    script = REPOSITORY / "scripts" / "vllm_env.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    reason = "no vLLM environment; `make test-vllm` builds it and runs this"
    if os.environ.get("KVINDEX_REQUIRE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
