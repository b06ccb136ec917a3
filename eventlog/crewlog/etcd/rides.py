"""Let the threads of one process share what they ask a server for.

A hundred watchers wake at the same moment and all ask the same. One asks, the others take its
answer; but never one that was asked for before they came, because that may be older than what woke
them.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from crewlog import threads

T = TypeVar("T")


class Rides(Generic[T]):
    """One question, and its newest answer."""

    def __init__(self) -> None:
        """Begin without an answer."""
        self._asking = threading.Lock()
        self._counting = threading.Lock()
        self._begun = 0  # how many times it was asked
        self._answered = 0  # which time the answer is of
        self._answer: T | None = None
        self._error: Exception | None = None

    def ask(self, question: Callable[[], T]) -> T:
        """Return the answer to a question that is asked from now on; an error is shared, too."""
        with self._counting:
            came = self._begun
        with self._asking:
            if self._answered <= came:
                self._ask(question)
            if self._error is not None:
                raise threads.own_copy(self._error)
            return self._answer  # type: ignore[return-value] # there is one, or an error

    def _ask(self, question: Callable[[], T]) -> None:
        with self._counting:
            self._begun += 1
            number = self._begun
        self._answer = self._error = None
        try:
            self._answer = question()
        except Exception as error:  # noqa: BLE001 (each rider raises it)
            self._error = error
        self._answered = number
