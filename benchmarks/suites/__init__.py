"""The suites: each module has ``run(settings)``, which yields one ``Case`` after another."""
