"""Trains on a CSV of answers with stars: turns stars into labels, checks the result, and trains with KTO.

    python own_csv.py [stars.csv]

The CSV has the columns prompt, answer and stars (1 to 5). Without an argument the file beside this script is used.
"""

import csv
import sys
from pathlib import Path

from palate import ModelTrainingRecipe
from palate_recipes.preferences.check import check

source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("stars.csv")

with source.open(newline="", encoding="utf-8") as given, open("thumbs.csv", "w", newline="", encoding="utf-8") as made:
    writer = csv.writer(made)
    writer.writerow(["prompt", "completion", "label"])
    for row in csv.DictReader(given):
        stars = int(row["stars"])
        if stars != 3:  # three stars say neither good nor bad
            writer.writerow([row["prompt"], row["answer"], "true" if stars > 3 else "false"])

# train() runs the same check; here it is shown before.
report = check([(Path("thumbs.csv"), "thumbs.csv")], strategy="kto")
print("\n".join(report.lines()))

recipe = ModelTrainingRecipe(
    model_name="smollm2-135m-instruct",
    hyperparameters={"training_strategy": "kto", "num_train_epochs": 4, "learning_rate": 5e-4, "logging_steps": 1},
)
job = recipe.train(inputs={"train": "thumbs.csv"})
for event in job.metrics():
    if event["kind"] == "train":
        print(f"step {event['step']:3}  loss {event['loss']:.3f}  kl {event['kl']:.3f}")
print(job.reading())
print("model:", job.model_uri)
