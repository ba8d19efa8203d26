"""Trains with several learning rates, from a file of experiments, and compares them.

    python sweep.py [RATE ...]

Run it again with other rates: those that were trained already are found in the store. The jobs share the scores of the reference
model, which only the first one computes.
"""

import sys
from pathlib import Path

from palate import ExperimentFile, TrainingJob
from palate_recipes.demo import write_demo

rates = sys.argv[1:] or ["1e-4", "5e-4", "2e-3"]
data = write_demo(Path("palate-demo"), per_topic=2)

file = Path("experiments.yml")
file.write_text(f"""
learning-rate:
  model_name: smollm2-135m-instruct
  inputs: {{train: {data["train"]}, validation: {data["validation"]}}}
  hyperparameters:
    training_strategy: dpo
    logging_steps: 2
    learning_rate: [{", ".join(rates)}]
""")

result = ExperimentFile.load(file, "learning-rate").run()
print(result)

print("\ntraining loss")
curves = {
    run.varied["learning_rate"]: {event["step"]: event for event in run.job.metrics() if event["kind"] == "train"}
    for run in result.runs
    if isinstance(run.job, TrainingJob)
}
print("step  " + "".join(f"{rate:>10.0e}" for rate in curves))
for step in sorted({step for curve in curves.values() for step in curve}):
    print(f"{step:4}  " + "".join(f"{curve[step]['loss']:10.3f}" for curve in curves.values()))

best = result.comparison.best
print(f"\nlowest validation loss: learning_rate={best.settings['learning_rate']:g}\nnext: palate deploy {best.id}")
