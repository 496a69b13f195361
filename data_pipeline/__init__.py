"""From documents to batches: readers, deduplication, tokenizer, shards, sample order, loader. Never imports `train`."""
