"""Every error a user can meet, each with the HTTP status it maps to. All survive pickling (Ray
re-raises them)."""

from __future__ import annotations


class GiantserveError(Exception):
    """Base of the project's errors. ``status_code`` is the HTTP status, ``error_type`` OpenAI's
    error type."""

    status_code = 500
    error_type = "server_error"


class InvalidRequestError(GiantserveError, ValueError):
    """The request asks for something that cannot be: a bad value, an unknown field, a prompt too
    long."""

    status_code = 400
    error_type = "invalid_request_error"


class AuthenticationError(GiantserveError):
    """The API key is missing or wrong."""

    status_code = 401
    error_type = "authentication_error"


class ModelNotFoundError(GiantserveError):
    """The request names a model that this server does not serve."""

    status_code = 404
    error_type = "not_found_error"


class QueueFullError(GiantserveError):
    """Admission refused the request: the queue is full. Carries the seconds after which to
    retry."""

    status_code = 429
    error_type = "rate_limit_error"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class EngineDeadError(GiantserveError):
    """A shard died or the engine stopped; the request may be retried on another replica."""

    status_code = 503
    error_type = "service_unavailable"


class KVLostError(GiantserveError):
    """A tier lost the KV of the request again and again; the disk under ``nvme_dir`` is failing."""

    status_code = 503
    error_type = "service_unavailable"


class OverflowedError(GiantserveError):
    """The model's logits for the request are not finite: its activations overflow the dtype."""


class ConfigError(GiantserveError, ValueError):
    """An option has a value that cannot be honoured; the message names the value, the limit and the
    mend."""

    status_code = 400
    error_type = "invalid_request_error"


class CheckpointError(ConfigError):
    """The checkpoint is missing, truncated, or lacks a tensor."""


class UnsupportedModelError(ConfigError):
    """The architecture, or this way of splitting it, cannot run; the message says why."""
