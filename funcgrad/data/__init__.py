"""Batches on the device: `prefetch`."""
