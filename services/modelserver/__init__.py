"""Serves weights over the Open Inference Protocol."""

QUEUE_BYTES = 256 * 1024 * 1024
"""Most bytes of batches that wait, by default. Here, since a child needs it and has no settings to import."""
