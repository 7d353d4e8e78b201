"""Costs that only a run can tell: latency and peak memory."""
