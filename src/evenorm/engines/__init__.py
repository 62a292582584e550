"""Engines: the same few operations, each fast somewhere."""
