"""Around Megatron's training loop: configuration, data and forward step, signals, the lock."""
