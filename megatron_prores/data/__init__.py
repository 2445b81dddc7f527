"""From raw text to what Megatron trains on: corpus, tokenizer, indexed dataset."""
