"""The loop of `shikomi chat`: lines in, streamed answers out, on a terminal or through pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from shikomi.errors import nearest

COMMANDS = {
    "/base": "the untouched model's answer to the same question",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave",
}

Answer = Callable[[list[dict[str, Any]], Callable[[str], None]], str]


class Conversation:
    """The messages so far, who answers, and how the untouched model is reached."""

    def __init__(self, answer: Answer, base: Callable[[], AbstractContextManager[Any]], system: str | None) -> None:
        self._answer = answer
        self._base = base
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._start)

    def reset(self) -> None:
        self.messages = list(self._start)

    def say(self, text: str, stream: Callable[[str], None]) -> None:
        """Answers `text` and remembers both; an answer that was interrupted is forgotten with its question."""
        asked = [*self.messages, {"role": "user", "content": text}]
        said = self._answer(asked, stream)
        self.messages = [*asked, {"role": "assistant", "content": said}]

    def ask_base(self, stream: Callable[[str], None]) -> bool:
        """The untouched model's answer to the last question, after the same conversation; False without a question."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return False
        with self._base():
            self._answer(self.messages[:-1], stream)
        return True


def talk(conversation: Conversation, name: str) -> None:
    """Reads lines until the end of input or /quit. Ctrl-C stops an answer; at the prompt it leaves."""
    at_a_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_a_terminal:
        import readline  # noqa: F401  line editing and history for input()

        print(f"{name}: write a message; {', '.join(COMMANDS)}")
    while True:
        try:
            line = input("> " if at_a_terminal else "").strip()
        except EOFError:
            break
        if line == "/quit":
            break
        if not line:
            continue
        try:
            _reply(conversation, line)
        except KeyboardInterrupt:
            if not at_a_terminal:
                raise
            print("\n(stopped)")
    if at_a_terminal:
        print()


def _reply(conversation: Conversation, line: str) -> None:
    if line == "/reset":
        conversation.reset()
        print("(the conversation is forgotten)")
    elif line == "/help":
        for command, about in COMMANDS.items():
            print(f"{command:<8} {about}")
    elif line == "/base":
        print("untouched model: ", end="", flush=True)
        print("" if conversation.ask_base(_print_piece) else "(nothing was asked yet)")
    elif line.startswith("/") and " " not in line:
        close = nearest(line, COMMANDS)
        print(f"unknown command {line}" + (f"; did you mean {close}?" if close else f"; {', '.join(COMMANDS)}"))
    else:
        conversation.say(line, _print_piece)
        print()


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
