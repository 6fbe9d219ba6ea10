"""Train state, compiled step, optimisers and schedules: what the training loop and linear probes share."""
