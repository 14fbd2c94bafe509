"""Side by side with peers: one module a benchmark, each run by ``make bench-<name>``."""
