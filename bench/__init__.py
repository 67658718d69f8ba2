"""The benchmarks: ``python -m bench.compare`` measures, ``python -m bench.report`` writes the README's tables and plots."""
