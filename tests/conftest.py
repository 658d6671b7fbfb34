"""Fixtures of more than one folder."""

from tests.vllm_server import vllm

__all__ = ["vllm"]
