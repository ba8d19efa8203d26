"""Trains with several learning rates and shows their curves side by side.

    python sweep.py [RATE ...]

The jobs run one after the other; they share the scores of the reference model, which only the first one computes.
"""

import sys
from pathlib import Path

from palate import ModelTrainingRecipe
from palate_recipes.demo import write_demo

rates = [float(text) for text in sys.argv[1:]] or [1e-4, 5e-4, 2e-3]
data = write_demo(Path("palate-demo"), per_topic=2)

jobs = {}
for rate in rates:
    recipe = ModelTrainingRecipe(
        model_name="smollm2-135m-instruct",
        hyperparameters={"training_strategy": "dpo", "learning_rate": rate, "logging_steps": 2},
        labels={"sweep": "learning-rate"},
        base_job_name="sweep",
    )
    jobs[rate] = recipe.train(inputs={"train": data["train"], "validation": data["validation"]}, show_logs=False)

curves = {
    rate: {event["step"]: event for event in job.metrics() if event["kind"] == "train"} for rate, job in jobs.items()
}
steps = sorted({step for curve in curves.values() for step in curve})
print("training loss")
print("step  " + "".join(f"{rate:>10.0e}" for rate in rates))
for step in steps:
    print(f"{step:4}  " + "".join(f"{curves[rate][step]['loss']:10.3f}" for rate in rates))

print("\nvalidation")
for rate, job in jobs.items():
    last = [event for event in job.metrics() if event["kind"] == "eval"][-1]
    print(f"{rate:.0e}  loss {last['eval_loss']:.3f}  accuracy {last['eval_rewards/accuracies']:.2f}  {job.reading()}")

best = min(jobs, key=lambda rate: [event for event in jobs[rate].metrics() if event["kind"] == "eval"][-1]["eval_loss"])
print(f"\nlowest validation loss: learning_rate={best:g}\nnext: palate deploy {jobs[best].id}")
