"""The search: options, loop, runners, checkpoints, and its result."""
