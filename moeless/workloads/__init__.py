"""Who asks, when, how much: prompts, arrivals, lengths, schedulers."""
