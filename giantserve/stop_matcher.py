"""Finds the first stop string in text that comes in pieces (Aho and Corasick, 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, holding back what may become one.

    The first is the one whose last character comes first; of several that end there, the longest.
    How the text is cut into pieces changes nothing. Linear in the text, however many stop strings
    there are.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._include_stop = include_stop
        self._held = ""
        self._state = 0
        self._children: list[dict[str, int]] = [{}]
        self._failure = [0]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def feed(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """The text to let through now, and the stop string that ``text`` completes, if any.

        Stop strings completed while not ``armed`` count as text. After a match, the rest of the
        text is gone, and the matcher is not to be fed again.
        """
        start = len(self._held)
        text = self._held + text
        state = self._state
        for place in range(start, len(text)):
            state = self._next(state, text[place])
            stop = self._match[state]
            if stop is not None and armed:
                self._held = ""
                end = place + 1
                return text[: end if self._include_stop else end - len(stop)], stop
        self._state = state
        released = len(text) - self._depth[state]
        self._held = text[released:]
        return text[:released], None

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for depth, character in enumerate(stop, start=1):
            child = self._children[state].get(character)
            if child is None:
                child = len(self._children)
                self._children[state][character] = child
                self._children.append({})
                self._failure.append(0)
                self._depth.append(depth)
                self._match.append(None)
            state = child
        self._match[state] = stop

    def _link(self) -> None:
        """Give each state the one for its longest proper suffix, breadth first."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._children[state].items():
                self._failure[child] = self._next(self._failure[state], character)
                queue.append(child)
            if self._match[state] is None:
                self._match[state] = self._match[self._failure[state]]

    def _next(self, state: int, character: str) -> int:
        while state and character not in self._children[state]:
            state = self._failure[state]
        return self._children[state].get(character, 0)
