"""Stream a chat from a server, then complete a batch. The client loads neither torch nor Ray.

giantserve serve ./my-model
python examples/client.py http://127.0.0.1:8000
"""

from __future__ import annotations

import sys

from giantserve.client import Client


def main(url: str) -> None:
    with Client(url) as client:
        for text in client.stream_chat("Who are you?", max_tokens=16):
            print(text, end="", flush=True)
        print()
        replies = client.batch(["one", "two", "three"], concurrency=2, max_tokens=8)
        for reply in replies:
            print(f"{reply.text!r} ({reply.usage.completion_tokens} tokens)")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
