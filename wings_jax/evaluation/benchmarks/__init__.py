"""The benchmarks of papers: declarations, readers of their files, prompts, answers, metrics, runs.

record       the types: Benchmark, Item, Prompt, Shots, FilePattern, DataSet, Judgment
records      BENCHMARKS: name -> Benchmark; the declarations are in text, text_tasks, chinese,
             image, yes_no and short_answers
embedded     EMBEDDED: the questions that come with the package, as benchmarks
readers      read_data_set(benchmark, data_root) -> DataSet, from the files of users: row_files
             reads rows, rewrites and image_rewrites change those of odd files, row_items and
             image_refs make items of them
prompts      render_choice, render_generation: what a model is asked; pure functions
passes       which requests answer which protocols
runner       runs the passes over a model, into a journal that can be resumed (journals)
extraction   judge_answer(extraction, item, text) -> Judgment of a generated answer; vqa and sandbox
             judge short answers and code
metrics      METRICS: name -> function of (items, credits), which returns MetricValues; ratings has
             the published formulas
summary      scores with intervals; results, tables and paired write and compare them, answer_figure
             draws answers beside images, legacy has what scripts of released versions read
command      evaluates models on benchmarks
"""
