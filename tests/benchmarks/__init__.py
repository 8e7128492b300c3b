"""Speed and memory beside what they should be measured against, both in one run: `python -m tests.benchmarks`."""
