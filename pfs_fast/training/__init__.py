"""Training from scratch, and what every loop over batches needs."""
