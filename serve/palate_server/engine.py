"""One engine process: its start, its first answers, its watch and its end. Knows the engine's HTTP paths, not what routes to it."""

from __future__ import annotations

import errno
import http.client
import json
import logging
import shutil
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from palate_recipes.device import available_memory
from palate_recipes.errors import ServerError
from palate_recipes.specs.serve import ACTIVITY_PATH, BASE_MODEL, HEALTH_PATH, STOP_GRACE_S, TUNED_MODEL, ServeSpec
from palate_server.causes import failure
from palate_server.plan import GPUS_VARIABLE, EnginePlan, engine_command, engine_environment
from palate_server.supervisor import Supervised

logger = logging.getLogger(__name__)

_KEPT_LINES = 400
_LINE_BYTES = 64 * 1024
_PROBE_EVERY_S = 0.1
_OUTPUT_S, _LAST_OUTPUT_S = 5.0, 1.0
"""Time for the output of an engine to be read: of one that has ended, and of one that still runs."""
_LOOK_EVERY_S = 5.0
_STILL_TIMES = 5
"""An engine hangs if requests make no progress, and a one-token request gets no answer, for this many times `hang_after_s`."""


class EngineError(Exception):
    """The engine answered with an error.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text}".rstrip())
        self.status = status


class Engine:
    """An engine of the service. Its events go to the queue, each with this object first.

    Attributes:
        name: Its name, such as `v1-0`.
        spec: What it serves.
        plan: How.
        socket: The Unix socket that it listens on.
        takes: Whether it may get new requests.
        models: Its names of the models that it has.
        started_with: Its names of the adapters that it has had from the start.
        failed: Why it could not load an adapter, by its name for it.
        gpus: Ids of the GPUs that it may use; none: all.
        leaving_at: Monotonic time since which it gets no new requests; 0 if it does.
        open: Open requests, as the front counts them.
        moved_at, waits_from, still_s: Its progress, as the front tells it, see `routes.Answering`.
        began_at: Monotonic time of its start.
        max_model_len: Its context length in tokens; None until it is up, or if unknown.
        is_up: Whether it has answered; changed by the service alone, as are `takes` and `models`.
    """

    def __init__(
        self,
        name: str,
        *,
        spec: ServeSpec,
        plan: EnginePlan,
        adapters: Mapping[str, str],
        put: Callable[[str, Engine, Any], None],
        gpus: Sequence[str] = (),
        sharing: int = 0,
    ) -> None:
        """Starts the process.

        Args:
            name: Its name.
            spec: What it serves.
            plan: How.
            adapters: Folders of the adapters that it has from the start, by its names for them.
            put: Reports an event: `up`, `refused` with a ServerError, `ended`, or `hung` with a text.
            gpus: Ids of the GPUs that it may use; none: all.
            sharing: Engines that divide the cores, this one included; 0: no other runs.
        """
        self.name = name
        self.spec = spec
        self.plan = plan
        self.takes = self.is_up = False
        self.started_with = frozenset(adapters)
        self.failed: dict[str, str] = {}
        self.leaving_at = 0.0
        self.gpus = tuple(gpus)
        self.models: set[str] = set()
        self.open = 0
        self.waits_from = self.still_s = 0.0
        self.max_model_len: int | None = None
        self.began_at = self.moved_at = time.monotonic()
        self._put = put
        self._free_bytes: int | None = None
        self._ending = threading.Event()
        # Of its own, because vLLM does not remove its sockets, and the work folder's path may be too long for one.
        self._folder = TemporaryDirectory(prefix="palate-")
        self.socket = f"{self._folder.name}/engine.sock"
        spec_file = Path(spec.work_dir) / f"engine-{name}.json"
        spec.write(spec_file)
        command = engine_command(spec, plan, spec_file=spec_file, socket=self.socket, adapters=adapters)
        self._process = Supervised(
            command,
            env={
                **engine_environment(plan, ipc_dir=self._folder.name, sharing=sharing),
                **({GPUS_VARIABLE: ",".join(gpus)} if gpus else {}),
            },
            cwd=Path(spec.work_dir),
            grace_s=STOP_GRACE_S,
            on_end=lambda: put("ended", self, None),
        )
        self._log = _Log(self._process.output)
        self._first_models = [TUNED_MODEL] if spec.base_model_dir is None else [*adapters, BASE_MODEL]
        threading.Thread(target=self._live, daemon=True).start()

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def has_ended(self, *, within_s: float) -> bool:
        """Whether the process ends within this time; then the event `ended` has been put."""
        return self._process.has_ended(within_s=within_s)

    def end(self, *, quiet: bool = False, at_once: bool = False) -> None:
        """Ends the process and all its descendants, and waits for them. Idempotent.

        Args:
            quiet: Whether its output is forwarded no more: vLLM reports its end on request as errors with a traceback.
            at_once: Whether it gets no time to end by itself, because it hangs.
        """
        self.takes = False
        self._ending.set()
        if quiet:
            self._log.end_forwarding()
        self._process.end(at_once=at_once)
        self._log.finish()
        self._folder.cleanup()
        spec_file = Path(self.spec.work_dir) / f"engine-{self.name}.json"
        spec_file.unlink(missing_ok=True)
        shutil.rmtree(spec_file.with_suffix(""), ignore_errors=True)  # what the transformers engine made

    def story(self, *, by_itself: bool = True) -> str:
        """Returns why it ended, in a line, with its last lines of output below.

        Args:
            by_itself: Whether its exit code tells something.
        """
        # A process that still runs ends no line of output; what it wrote before its error answer arrives at once.
        self._log.finish(timeout_s=_LAST_OUTPUT_S if self.returncode is None else _OUTPUT_S)
        returncode = self.returncode if by_itself else None
        command = f"palate logs {self.spec.service_name}"
        return failure(self._log.lines(), returncode=returncode, free_bytes=self._free_bytes, log=command)

    # ── asking it ───────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, path: str, request: dict[str, Any] | None = None, *, timeout_s: float) -> bytes:
        """Sends a request and returns the answer's body; a GET without `request`.

        Raises:
            EngineError: The answer is an error.
            OSError: There is none.
        """
        connection = _UnixConnection(self.socket, timeout_s)
        try:
            if request is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise EngineError(response.status, content[:2000].decode(errors="replace"))
        return content

    def token_of(self, model: str, *, timeout_s: float) -> None:
        """Makes the model generate one token. Raises like `ask`."""
        self.ask("/v1/completions", {"model": model, "prompt": "Hello", "max_tokens": 1}, timeout_s=timeout_s)

    # ── its thread ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _live(self) -> None:
        try:
            if self._come_up():
                self._watch()
        except Exception as error:
            logger.exception("engine %s", self.name)
            self._put("refused", self, ServerError(f"it cannot be watched ({type(error).__name__}: {error})"))

    def _come_up(self) -> bool:
        """Requests one token from each model until it answers. Reports an error answer at once."""
        for model in self._first_models:
            while not self._ending.wait(_PROBE_EVERY_S):
                try:
                    self.token_of(model, timeout_s=self.spec.start_timeout_s)
                    break
                except EngineError as error:
                    if error.status != 503:  # 503: the engine is still starting
                        # A server error's text only points to the log, which has the cause.
                        text = str(error) if error.status < 500 else str(error.status)
                        self._put(
                            "refused", self, ServerError(f"its model '{model}' answered its first request with {text}")
                        )
                        return False
                except OSError:
                    pass  # it does not accept connections yet
            if self._ending.is_set():
                return False
        self._free_bytes = available_memory()
        self.max_model_len = self._context()
        self.moved_at = time.monotonic()
        self._put("up", self, None)
        return True

    def _context(self) -> int | None:
        if self.plan.engine.name == "transformers":  # its list is that of a cache folder
            return self.spec.max_model_len
        try:
            cards = json.loads(self.ask("/v1/models", timeout_s=10))["data"]
            return next((int(card["max_model_len"]) for card in cards if card.get("max_model_len")), None)
        except (EngineError, OSError, ValueError, LookupError, TypeError):
            return None

    def _watch(self) -> None:
        """Polls it every few seconds, and reports once if it hangs.

        A busy engine is not a hung one. It answers health checks from an event loop that does no computing, so if it is silent, the
        process is stopped or stuck. If requests make no progress, a one-token request decides: a working engine answers it between
        the others.
        """
        hang_after_s = self.spec.hang_after_s
        seen_at = time.monotonic()
        while not self._ending.wait(min(_LOOK_EVERY_S, hang_after_s / 4)):
            asked_at = time.monotonic()
            try:
                self.ask(HEALTH_PATH, timeout_s=hang_after_s)
            except EngineError:
                pass  # an error answer shows that the process is alive
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    continue  # this program's own lack of descriptors says nothing about the engine
                if time.monotonic() - seen_at >= hang_after_s:
                    self._put("hung", self, f"it has not answered for {hang_after_s:g} s ({error})")
                    return
                continue
            seen_at = asked_at
            if self._still_s() >= hang_after_s:
                limit_s = _STILL_TIMES * hang_after_s
                asked_at = time.monotonic()
                try:
                    self.token_of(self._first_models[0], timeout_s=limit_s)
                except EngineError:
                    pass  # an answer
                except OSError as error:
                    has_moved = self.moved_at >= asked_at
                    still_s = self._still_s(at_least=time.monotonic() - asked_at)  # also if all others have left
                    if not self._ending.is_set() and not has_moved and still_s >= limit_s:
                        self._put("hung", self, f"it generated no token within {limit_s:g} s ({error})")
                        return
                    continue
                self.moved_at, self.still_s = time.monotonic(), 0.0

    def _still_s(self, *, at_least: float = 0.0) -> float:
        """Returns the seconds for which it had open requests without any progress, also if their clients have left."""
        still_s = time.monotonic() - max(self.moved_at, self.waits_from) if self.open else self.still_s
        still_s = max(still_s, at_least)
        if still_s < self.spec.hang_after_s or self.plan.engine.name != "transformers":
            return still_s
        try:  # it tells of each token of an answer that is not streamed
            return min(still_s, float(json.loads(self.ask(ACTIVITY_PATH, timeout_s=self.spec.hang_after_s))["still_s"]))
        except (EngineError, OSError, ValueError, LookupError):
            return still_s


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("engine", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _Log:
    """Forwards the engine's output to stdout and keeps the last lines."""

    def __init__(self, output: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._output = output
        self._passing_on = True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while line := self._output.readline(_LINE_BYTES):
            self._lines.append(line.decode(errors="replace").rstrip())
            if self._passing_on:
                try:
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
                except (OSError, ValueError):
                    # stdout is closed; keep reading, because a full pipe would block the engine
                    self._passing_on = False

    def end_forwarding(self) -> None:
        """Forwards no more lines."""
        self._passing_on = False

    def finish(self, *, timeout_s: float = _OUTPUT_S) -> None:
        """Waits until all output of the ended engine is read."""
        self._reader.join(timeout=timeout_s)

    def lines(self) -> list[str]:
        """Returns the last lines that are not empty."""
        return [line for line in self._lines if line.strip()]
