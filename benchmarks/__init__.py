"""Benchmarks of pfs_fast; see README.md. Nothing else imports this package."""
