"""The gated network: where the gates sit, what runs around them, and how dead channels leave it."""
