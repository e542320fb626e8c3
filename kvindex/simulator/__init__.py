"""An engine without a GPU: vLLM's block pool, scheduler, events and API, with made-up tokens and a latency model.

The engine (`engine.Engine`) is a pure step function. `kvindex sim` drives it in real time behind HTTP and ZMQ.
"""

from kvindex.simulator.config import EngineConfig, LatencyModel
from kvindex.simulator.engine import Engine
from kvindex.simulator.request import Request
from kvindex.simulator.results import Output, StepResult

__all__ = ["Engine", "EngineConfig", "LatencyModel", "Output", "Request", "StepResult"]
