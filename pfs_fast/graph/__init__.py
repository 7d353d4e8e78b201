"""From a model to its channel groups: tracing, propagation of channels through every operation, and what each layer costs."""
