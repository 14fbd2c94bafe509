"""Functions on arrays: channels last, C-contiguous, results written into ``out`` and scratch memory handed in."""
