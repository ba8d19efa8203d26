"""vLLM's own server program, at the socket that the server program hands over. Knows how vLLM is started, nothing of its inside.

Run as a program by the server, never imported by it: `python -m palate_server.vllm OPTIONS...`, vLLM's options.
"""

from __future__ import annotations

import runpy

from palate_server.listener import serve_on, take_listener

if __name__ == "__main__":
    serve_on(take_listener())
    # In the place of this module: the processes that vLLM starts import the main module anew.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
