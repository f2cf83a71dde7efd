"""Records, batches and replays calls of modules."""
