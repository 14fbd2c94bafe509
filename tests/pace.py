"""How fast a machine is: what is promised in seconds is promised for one of usual speed."""

from __future__ import annotations

import time

FUNCTIONS = "".join(f"def f{n}(x, y=1):\n return [a + {n} for a in x if a > y]\n" for n in range(1000))
USUAL = 0.033  # seconds in which a machine of usual speed compiles them


def compile_seconds() -> float:
    """Return the seconds of this thread that compiling ``FUNCTIONS`` takes now."""
    start = time.thread_time()
    compile(FUNCTIONS, "functions", "exec")
    return time.thread_time() - start


def slowness() -> float:
    """Return how many times longer than usual this machine takes; 1 for one that is faster."""
    return max(1.0, min(compile_seconds() for _ in range(5)) / USUAL)
