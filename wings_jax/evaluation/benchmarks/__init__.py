"""The benchmarks of papers: declarations, readers of their files, prompts, answers, metrics.

record       the types: Benchmark, Item, Prompt, Shots, FilePattern, DataSet, Judgment
records      BENCHMARKS: name -> Benchmark
readers      read_data_set(benchmark, data_root) -> DataSet, from the files of users
prompts      render_choice, render_generation: what a model is asked; pure functions
extraction   judge_answer(extraction, item, text) -> Judgment of a generated answer
metrics      METRICS: name -> function of (items, credits), which returns MetricValues
"""
