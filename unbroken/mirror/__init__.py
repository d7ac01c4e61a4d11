"""A copy of a run in object storage."""
