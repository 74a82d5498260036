"""Benchmarks of the ops against their rivals: `fuserl bench`, `python -m pytest benchmarks`.

case.py says what is asked, problem.py makes inputs and the float64 truth, ops.py is the table of
ops and providers, checking.py judges answers, timing.py and memory.py measure, report.py tells.
No provider is timed before its answer is checked, and no speed is told while an answer of ours is
wrong.
"""
