"""Fixtures of more than one folder."""

import signal

from hypothesis import settings

from tests.vllm_server import vllm

__all__ = ["vllm"]

# A shell starts what runs in its background with SIGINT ignored, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("untimed", deadline=None)  # a loaded machine is no failure
settings.load_profile("untimed")
