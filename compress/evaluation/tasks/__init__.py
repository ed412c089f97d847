"""Tasks through lm-eval: questions with answers, asked of the source and of what will ship.

lm-eval builds the prompts and marks the answers; what is ours is how a model answers them: log-likelihoods by the block
walk, so that a model larger than memory can be judged, and greedy text through the public loader.

    spec ─▶ items (JSONL, checked) ─▶ question (an lm-eval task) ─▶ prepare (dry run: every prompt is known and checked)
                                                                        │
                          source, artifact ──▶ answer (language_model: likelihood, generate) ─▶ results ─▶ compare

spec              what a recipe says
items             JSONL -> items, every mistake with its line
question          items -> lm-eval task, in memory
size              how much reading a task is, before there is a tokenizer
prepare           the prompts of a task as tokens, checked before any work
language_model    lm-eval's LM interface over a checkpoint folder
likelihood        log-likelihoods of continuations by the block walk
generate          greedy text through the public loader
results           what one model answered, item by item
compare           both models' answers: measurements, flips, examples
harness           the one place that calls lm-eval, quietly

Only `harness`, `question` and `language_model` import lm-eval; they are imported when a recipe has a task.
"""
