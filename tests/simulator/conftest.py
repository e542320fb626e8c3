"""The environment of a real vLLM, shared with the tests that run it."""

from tests.vllm.conftest import vllm_python

__all__ = ["vllm_python"]
