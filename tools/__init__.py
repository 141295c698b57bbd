"""Before and after training: text to shards."""
