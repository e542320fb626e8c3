"""kvindex: where every KV block of an inference fleet is, and where a request should go."""

__version__ = "0.1.0"
