"""Runs vLLM's own server on the socket that the server program passes on. Knows how vLLM starts, not its internals.

The server runs it as a program and never imports it: `python -m palate_server.vllm OPTIONS...`, with vLLM's options.
"""

from __future__ import annotations

import runpy

from palate_server.listener import serve_on, take_listener

if __name__ == "__main__":
    serve_on(take_listener())
    # alter_sys replaces this module as __main__: processes that vLLM spawns import the main module again.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
