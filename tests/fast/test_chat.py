"""`palate chat` at a real pseudo-terminal, with a service that streams what it was asked."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palate import Predictor
from palate.chat import Chat
from palate.errors import ServiceError
from palate.runs.record import TOKEN_KEY, Record
from palate.store import open_store
from tests.support.fronted import fronted_service
from tests.support.manifests import serve_manifest

TOKEN = "a-token-for-tests"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@pytest.fixture
def service(home: Path) -> Iterator[str]:
    store = open_store(f"file://{home}/store")
    record = Record(store, "services", "svc")
    record.create(serve_manifest(system_prompt="Be brief"))
    store.put(record.key(TOKEN_KEY), TOKEN.encode(), private=True)
    with fronted_service(TOKEN, chats=True) as fronted:
        record.advance("Running", expect={"Creating"}, endpoint=fronted.endpoint, engine_id="elsewhere:1:2:x")
        yield "svc"


class Terminal:
    """A process and the terminal that it holds: what is typed, what was shown."""

    def __init__(self, process: subprocess.Popen[bytes], controller: int) -> None:
        self.process = process
        self._controller = controller
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    def shown(self, until: str) -> str:
        """Waits for a text; returns what was shown since the last one, up to it."""
        deadline = time.monotonic() + 60
        while until not in self._seen:
            ready, _, _ = select.select([self._controller], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{until!r} was not shown, but {self._seen!r}"
            try:
                data = os.read(self._controller, 65536)
            except OSError:  # EIO: the process has closed its terminal
                data = b""
            assert data, f"it ended before {until!r}: {self._seen!r}"
            self._seen = ESCAPES.sub("", self._seen + data.decode())
        before, found, self._seen = self._seen.partition(until)
        return before + found

    def interrupt(self, until: str, send: Callable[[], None] | None = None) -> None:
        """Sends Ctrl-C, or what is given, until the text is shown.

        Python's readline misses a signal that comes between its prompt and its wait for a key, so one may not be enough. A second
        one that comes while the first is slowly handled would break off the end of the command.
        """
        deadline = time.monotonic() + 60
        while until not in self._seen and time.monotonic() < deadline:
            if send is None:
                self.type("\x03")
            else:
                send()
            if select.select([self._controller], [], [], 15)[0]:
                self._seen = ESCAPES.sub("", self._seen + os.read(self._controller, 65536).decode())
        self.shown(until)

    def hold_ctrl_c(self, *shown: str) -> None:
        """Sends signals about a millisecond apart until the texts were shown, so that some arrive while the first is handled."""
        for text in shown:
            deadline = time.monotonic() + 60
            while text not in self._seen and time.monotonic() < deadline:
                os.kill(self.process.pid, signal.SIGINT)
                if select.select([self._controller], [], [], 0.001)[0]:
                    self._seen = ESCAPES.sub("", self._seen + os.read(self._controller, 65536).decode())
            self.shown(text)

    def ask(self, text: str, answer: str) -> str:
        self.type(f"{text}\n")
        return self.shown(answer) + self.shown("\n> ")


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def chatting(home: Path, *arguments: str) -> Iterator[Terminal]:
    controller, held = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "palate.cli", "chat", *arguments],
        stdin=held,
        stdout=held,
        stderr=held,
        preexec_fn=_own_terminal,
        env={**os.environ, "PALATE_HOME": str(home), "TERM": "xterm", "INPUTRC": "/dev/null"},
    )
    os.close(held)
    try:
        yield Terminal(process, controller)
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_a_conversation_with_its_commands(home: Path, service: str, tmp_path: Path) -> None:
    with chatting(home, service) as terminal:
        assert "Ctrl-D leaves" in terminal.shown("\n> ")
        terminal.ask("hello", "[su] default 0.7 hello.")
        terminal.ask("again", "[suau] default 0.7 again.")
        terminal.ask("/temperature 0.2", "temperature 0.2")
        terminal.ask("/model svc", "model svc")
        terminal.ask("third", "[suauau] default 0.2 third.")  # the gateway knows svc as default
        terminal.ask("/temperature hot", "error: /temperature 'hot': expected a number from 0 to 2")
        terminal.ask("/model gpt", "no such model. It has: default, svc")
        terminal.ask("/modle svc", "/modle is not a command: /help lists them")
        terminal.ask("//etc is a folder", "/etc is a folder.")
        terminal.ask("/reset", "forgotten")
        terminal.ask('/system ""', "no system prompt")
        terminal.ask("fresh", "[u] default 0.2 fresh.")
        terminal.ask("/system Be kind", "system prompt: Be kind")
        terminal.type("\n")  # asks nothing
        terminal.shown("\n> ")
        file = tmp_path / "talk.json"
        terminal.ask(f"/save {file}", "saved 3 messages")
        assert [row["role"] for row in json.loads(file.read_text())[0]["messages"]] == ["system", "user", "assistant"]
        terminal.ask(f"/save {file}", "the file exists")
        terminal.ask("/save", "needs a file name")
        terminal.ask("/help", "/temperature [X]")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0


def test_ctrl_c_stops_the_answer_and_not_the_session(home: Path, service: str) -> None:
    with chatting(home, service) as terminal:
        terminal.shown("\n> ")
        terminal.type("forever\n")
        terminal.shown("[su] default 0.7 forever.")
        terminal.type("typed ahead\n\x04")
        terminal.type("\x03")
        between = terminal.shown("\n> ")
        assert "stopped" in between
        assert "typed ahead" not in between
        # The stopped answer is part of the conversation, and what was typed meanwhile is not asked.
        shown = terminal.ask("next", "[suau] default 0.7 next.")
        assert "typed" not in shown
        terminal.type("half a li")
        terminal.shown("half a li")
        terminal.interrupt("Ctrl-D leaves")
        terminal.shown("\n> ")
        terminal.ask("whole", "[suauau] default 0.7 whole.")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0


def test_a_ctrl_c_that_is_held_down_stops_one_answer(home: Path, service: str) -> None:
    with chatting(home, service) as terminal:
        terminal.shown("\n> ")
        for _ in range(10):
            terminal.type("forever\n")
            terminal.shown("0.7 forever.")
            terminal.hold_ctrl_c("stopped", "\n> ")
            # Python's readline loses a line that is typed at the moment of a signal, so one may not be enough.
            terminal.interrupt("the conversation is forgotten", lambda: terminal.type("/reset\n"))
        terminal.ask("last", "[su] default 0.7 last.")


def test_sigterm_ends_the_session(home: Path, service: str) -> None:
    for question in ("", "forever\n"):
        with chatting(home, service) as terminal:
            terminal.shown("\n> ")
            if question:
                terminal.type(question)
                terminal.shown("0.7 forever.")
            terminal.interrupt("ended by SIGTERM", terminal.process.terminate)
            assert terminal.process.wait(timeout=60) == 143


def test_lines_can_be_edited_and_are_found_again_in_the_next_session(home: Path, service: str) -> None:
    pytest.importorskip("readline")
    with chatting(home, service) as terminal:
        terminal.shown("\n> ")
        terminal.ask("hxllo\x1b[D\x1b[D\x1b[D\x7fe", "0.7 hello.")  # three to the left, backspace, e
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    history = home / "chat_history"
    assert history.read_text() == "hello\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with chatting(home, service) as terminal:
        terminal.shown("\n> ")
        terminal.ask("\x1b[A", "[su] default 0.7 hello.")


def test_a_long_history_is_shortened(home: Path, service: str) -> None:
    home.mkdir(exist_ok=True)
    history = home / "chat_history"
    history.write_text("".join(f"line {number}\n" for number in range(2500)))
    with chatting(home, service) as terminal:
        terminal.shown("\n> ")
        terminal.ask("hi", "0.7 hi.")
    lines = history.read_text().splitlines()
    assert (len(lines), lines[0], lines[-1]) == (1001, "line 1500", "hi")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_conversation_from_python(service: str) -> None:
    chat = Chat(Predictor(service))
    assert chat.ask("hello") == "[su] default 0.7 hello."
    assert chat.ask("again", temperature=0) == "[suau] default 0 again."
    with pytest.raises(ServiceError, match="service svc answered 400"):
        chat.ask("refuse")
    assert [turn["content"] for turn in chat.messages[:2]] == ["Be brief", "hello"]
    assert len(chat.messages) == 5
    chat.reset()
    assert chat.ask("fresh") == "[su] default 0.7 fresh."


def test_a_failed_question_leaves_the_conversation_as_it_was(home: Path, service: str) -> None:
    with chatting(home, service) as terminal:
        terminal.shown("\n> ")
        terminal.ask("one", "[su] default 0.7 one.")
        terminal.ask("too hot", "[suau] default 0.7 too hot.")
        assert "Error code" not in terminal.ask("refuse", "error: service svc answered 400")
        terminal.ask("two", "[suauau] default 0.7 two.")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=60) == 0


def piped(home: Path, service: str, messages: bytes, **environment: str) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "palate.cli", "chat", service],
        input=messages,
        capture_output=True,
        env={**os.environ, "PALATE_HOME": str(home), **environment},
        timeout=120,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_messages_from_a_pipe_are_no_commands(home: Path, service: str) -> None:
    shown = "[su] default 0.7 one.\n[suau] default 0.7 /help.\n"
    assert piped(home, service, b"one\n\n/help\n") == (0, shown, "")
    assert not (home / "chat_history").exists()


def test_half_a_character_in_an_answer_does_not_end_the_conversation(home: Path, service: str) -> None:
    shown = "[su] default 0.7 half.?\n[suau] default 0.7 two.\n"
    assert piped(home, service, b"half\ntwo\n") == (0, shown, "")


def test_an_answer_that_was_cut_says_so(home: Path, service: str) -> None:
    code, shown, note = piped(home, service, b"long\ntwo\n")
    assert (code, shown.count("\n")) == (0, 2)
    assert note == "note: cut at 512 tokens, thoughts included; --max-tokens sets the limit\n"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_messages_in_another_encoding_are_an_error_of_one_line(home: Path, service: str, locale: str) -> None:
    code, shown, error = piped(home, service, b"caf\xe9\n", LC_ALL=locale, PYTHONIOENCODING="utf-8:strict")
    assert (code, shown) == (1, "")
    assert re.fullmatch(r"error: the messages on stdin are not valid UTF-8.*\n", error)
