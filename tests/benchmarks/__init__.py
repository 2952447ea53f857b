"""Measurements, run by hand; pytest collects nothing here.

python -m tests.benchmarks.engine      speed and memory beside a plain transformers + peft loop
"""
