"""Measurements, run by hand; pytest collects nothing here.

python -m tests.benchmarks.engine      speed and memory beside a plain transformers + peft loop
python -m tests.benchmarks.overlap     what the shape of a training loop costs in clock cycles
"""
