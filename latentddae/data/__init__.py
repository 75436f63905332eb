"""Images -> moments -> shards -> batches."""
