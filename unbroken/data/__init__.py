"""Token shards, the endless stream, and the batches that are read from it."""
