"""The OpenAI-compatible HTTP face of an engine."""
