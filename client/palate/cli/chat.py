"""The command `chat`: one message, messages from a pipe, or a conversation at a terminal. Knows a service's client, no engine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from palate.chat import MAX_TOKENS, TEMPERATURE, Conversation
from palate.cli.format import Terminated, say_next
from palate.paths import palate_home
from palate_recipes.errors import ConfigurationError, PalateError
from palate_recipes.text import expand_path, show_path, visible

if TYPE_CHECKING:
    from palate.web import WebUI

HISTORY_FILE = "chat_history"
HISTORY_LINES = 1000

_HELP = """/help              show this list
/reset             forget the conversation; the system prompt stays
/system [TEXT]     show or change the system prompt; "" removes it
/model [NAME]      show or change the model
/temperature [X]   show or change the sampling temperature
/save FILE         write the conversation to a new JSON file
//TEXT             send a message that starts with /
/exit              leave, as exit, quit and Ctrl-D do
Ctrl-C stops an answer."""

_LEAVING = ("/exit", "/quit", "exit", "quit")
_CTRL_C_HINT = "Ctrl-D leaves, /help lists the commands"

_SAME_CTRL_C_S = 3.0
"""A Ctrl-C within this time after another, which is still being handled, counts as the same one."""


def chat(
    service: Annotated[str, typer.Argument(help="Service name.")],
    message: Annotated[
        str | None, typer.Argument(help="One message. Without it: a conversation from the terminal or stdin.")
    ] = None,
    model: Annotated[str, typer.Option(help="Model to ask: default (tuned) or base.")] = "default",
    system: Annotated[str | None, typer.Option(help="System prompt. Default: the one used in training.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = MAX_TOKENS,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the most likely token.")
    ] = TEMPERATURE,
    web: Annotated[
        bool, typer.Option("--web", help="Serve a page on this machine: models side by side, and blind votes.")
    ] = False,
    votes: Annotated[
        Path | None,
        typer.Option(help="With --web: file for the votes. Default: votes/SERVICE.jsonl in PALATE_HOME."),
    ] = None,
    port: Annotated[int, typer.Option(help="With --web: port on 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Chat with a service; answers stream to stdout. At a terminal /help lists the commands of the conversation."""
    from palate.predictor import Predictor

    if system is not None:
        _check_text("--system", system)
    if message is not None:
        _check_text("the message", message)
        if not message.strip():
            raise ConfigurationError("the message is empty: omit it for a conversation")
    predictor = Predictor(service)
    if web:
        if message is not None:
            raise ConfigurationError("--web takes no message: write it in the page")
        with predictor.webui(
            votes=votes,
            port=port,
            models=[] if model == "default" else [model],
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
        ) as page:
            _serve(page)
        return
    if votes is not None or port:
        raise ConfigurationError(f"--{'port' if votes is None else 'votes'} is for the page: add --web")
    talk = Conversation(
        service=service,
        client=predictor.openai(),
        model=model,
        system=predictor.manifest.body.system_prompt if system is None else system,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    if model != "default":  # which every service has
        talk.choose_model(model, "--model")
    if message is not None:
        _answer(talk, message)
    elif sys.stdin.isatty():
        _converse(talk)
    else:
        try:
            for line in sys.stdin:
                if text := line.strip():
                    _check_text("the message", text)
                    _answer(talk, text)
        except UnicodeDecodeError:
            raise ConfigurationError("the messages on stdin are not valid UTF-8: convert them, as with iconv") from None


def _serve(page: WebUI) -> None:
    print(page.url, flush=True)
    port = urlsplit(page.url).port
    _say(
        f"Open this address in a browser of this machine; it contains a key, so do not share it. From another machine first run\n"
        f"  ssh -L {port}:127.0.0.1:{port} HOST\nVotes: {show_path(page.votes)}. Ctrl-C ends the page"
    )
    try:
        page.wait()
    except Terminated:
        raise
    except KeyboardInterrupt:
        _say("")
    if page.pairs_count:
        say_next("data", "check", page.votes)


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{what} {text!r} is not valid UTF-8: check the terminal's encoding") from None


def _answer(talk: Conversation, text: str, ctrl_c: _CtrlC | None = None) -> None:
    """Prints the answer as it comes. The line is ended in any case, so that what follows starts on its own."""
    pieces = talk.ask(text)
    shown = False
    try:
        for piece in pieces:
            print(visible(piece), end="", flush=True)
            shown = True
            if ctrl_c is not None:
                ctrl_c.check()
    except BaseException:
        pieces.close()  # type: ignore[attr-defined]  # a generator; keeps what was shown before the next question
        if shown:
            print(flush=True)
        raise
    print(flush=True)
    if talk.was_cut:  # of a model that thinks first, nothing may have been shown
        _say(f"note: cut at {talk.max_tokens} tokens, thoughts included; --max-tokens sets the limit")


# ── the conversation at a terminal ──────────────────────────────────────────────────────────────────────────────────


def _converse(talk: Conversation) -> None:
    _say(f"{talk.service}, model {talk.model}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    lines = _LineReader(palate_home() / HISTORY_FILE)
    with _CtrlC() as ctrl_c:
        _read_and_answer(talk, lines, ctrl_c)


def _read_and_answer(talk: Conversation, lines: _LineReader, ctrl_c: _CtrlC) -> None:
    while True:
        try:
            ctrl_c.expect()
            line = lines.read("> ")
            if line is None:
                _say("")
                return
            text = line.strip()
            if text in _LEAVING:
                return
            if text.startswith("/") and not text.startswith("//"):
                _command(talk, text)
            elif text:
                _check_text("the message", text)
                with _keys_ignored():
                    _answer(talk, text.removeprefix("/"), ctrl_c)
        except Terminated:
            raise
        except KeyboardInterrupt:
            # The terminal echoes ^C without a line end at the prompt. A stopped answer has ended its line.
            _say(f"\n{_CTRL_C_HINT}" if lines.is_reading else "stopped")
        except PalateError as error:
            _say(f"error: {error}")


def _command(talk: Conversation, line: str) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/help":
            _say(_HELP)
        case "/reset":
            talk.turns.clear()
            _say("the conversation is forgotten")
        case "/system":
            if rest:
                _check_text("the system prompt", rest)
                talk.system = "" if rest in ('""', "''") else rest
            _say(f"system prompt: {talk.system}" if talk.system else "no system prompt")
        case "/model":
            if rest:
                talk.choose_model(rest, "/model")
            _say(f"model {talk.model}" + ("" if rest else f"; the service has: {', '.join(talk.model_names())}"))
        case "/temperature":
            if rest:
                talk.temperature = _temperature(rest)
            _say(f"temperature {talk.temperature:g}")
        case "/save":
            _save(talk, rest)
        case _:
            _say(f"{name} is not a command: /help lists them. To send it as a message write /{line}")


def _temperature(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:  # also for NaN
        raise ConfigurationError(f"/temperature {given!r}: expected a number from 0 to 2")
    return value


def _save(talk: Conversation, given: str) -> None:
    if not given:
        raise ConfigurationError("/save needs a file name, such as /save talk.json")
    try:
        path = Path(expand_path(given))
        with path.open("x", encoding="utf-8") as file:  # x: never over a file of the user's
            json.dump([{"messages": talk.messages}], file, ensure_ascii=False, indent=1)
            file.write("\n")
    except FileExistsError:
        raise ConfigurationError(f"/save {given}: the file exists; choose another name") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"/save {given}: {getattr(error, 'strerror', None) or error}") from None
    _say(f"saved {len(talk.messages)} messages to {path}")


def _say(text: str) -> None:
    """Prints what is not an answer, on stderr: stdout has answers only."""
    print(visible(text), file=sys.stderr, flush=True)


class _LineReader:
    """Reads lines with editing and a history, which is kept in a file between sessions.

    Args:
        file: The history: one line per entry, oldest first, private to the user.
    """

    def __init__(self, file: Path) -> None:
        self.is_reading = False
        self._file = file
        # input() edits lines only if stdout is the terminal too. Otherwise its prompt would be in the redirected answers.
        self._edits = sys.stdout.isatty()
        try:
            import readline
        except ImportError:  # some builds of Python lack it: lines are read without editing
            self._readline: Any = None
        else:
            self._readline = readline
            # Palate writes the history itself: libedit has another file format, and neither makes the file private.
            readline.set_auto_history(False)
            readline.clear_history()
            for line in self._kept():
                readline.add_history(line)

    def read(self, prompt: str) -> str | None:
        """Returns the next line, or None at the end of the input."""
        self.is_reading = True
        try:
            if self._edits:
                line = input(prompt)
            else:
                print(prompt, end="", file=sys.stderr, flush=True)
                if not (line := sys.stdin.readline()):
                    return None
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise ConfigurationError("the line is not valid UTF-8: check the terminal's encoding") from None
        self.is_reading = False
        if line.strip():
            self._keep(line)
        return line

    def _keep(self, line: str) -> None:
        entry = " ".join(line.splitlines())  # a pasted text has line ends
        if self._readline is not None:
            self._readline.add_history(entry)
        with suppress(OSError, UnicodeError):  # a history that cannot be written does not end the conversation
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with open(os.open(self._file, flags, 0o600), "a", encoding="utf-8") as file:
                file.write(f"{entry}\n")

    def _kept(self) -> list[str]:
        try:
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(lines) > 2 * HISTORY_LINES:  # rare: a concurrent session may lose its last line
                draft = self._file.with_name(f"{HISTORY_FILE}.{os.getpid()}")
                with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines[-HISTORY_LINES:])
                draft.replace(self._file)
        except OSError:
            return []
        return lines[-HISTORY_LINES:]


class _CtrlC:
    """SIGINT of a conversation: raises KeyboardInterrupt once per press. A context manager, which restores the handler.

    A key that is held down, or pressed twice, sends several signals. A second exception while the first one is handled would end
    the conversation, or leave the terminal without echo.
    """

    def __init__(self) -> None:
        self._received_at: float | None = None
        self._before: Any = None

    def __enter__(self) -> _CtrlC:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # not where the process was started with SIGINT ignored
            signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._before)

    def expect(self) -> None:
        """Called when an earlier one has been handled: the next one is raised at once."""
        self._received_at = None

    def check(self) -> None:
        """Raises KeyboardInterrupt if one was received and lost: Python ignores exceptions in destructors and callbacks."""
        if self._received_at is not None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None or now - self._received_at > _SAME_CTRL_C_S:
            self._received_at = now
            raise KeyboardInterrupt


@contextmanager
def _keys_ignored() -> Iterator[None]:
    """Keeps keys pressed during an answer out of it and out of the next prompt. Ctrl-C still interrupts."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
        yield
    finally:
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)  # FLUSH: drops what was typed and not read
        except KeyboardInterrupt:  # a signal while it waited for the output to be shown
            termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
            raise


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(chat)
