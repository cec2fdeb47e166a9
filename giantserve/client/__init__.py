"""Clients of a giantserve server. They need neither torch nor Ray.

>>> from giantserve.client import Client
>>> with Client("http://127.0.0.1:8000") as client:
...     print(client.complete("Once upon a time", max_tokens=32).text)
"""

from giantserve.client.async_client import AsyncClient
from giantserve.client.client import Client
from giantserve.client.reply import Reply
from giantserve.client.retry import RetryPolicy

__all__ = ["AsyncClient", "Client", "Reply", "RetryPolicy"]
