"""Batches: `prefetch`."""
