"""SFT on good answers, then DPO on pairs that continues from the SFT adapter. Writes ./palate-demo; both jobs are kept."""

from pathlib import Path

from palate import ModelTrainingRecipe
from palate_recipes.demo import write_demo

MODEL = "smollm2-135m-instruct"
data = write_demo(Path("palate-demo"), per_topic=2)

# SFT reads the chosen answers of a preference file and ignores the rejected ones.
sft = ModelTrainingRecipe(
    model_name=MODEL,
    hyperparameters={"training_strategy": "sft", "learning_rate": 5e-4, "lora_dim": 16, "lora_alpha": 16},
    base_job_name="example-sft",
)
first = sft.train(inputs={"train": data["train"]})

# The adapter is the starting point and the reference: step 0 has margin 0. Rank and alpha are the adapter's.
dpo = ModelTrainingRecipe(
    model_name=MODEL,
    hyperparameters={"training_strategy": "dpo", "learning_rate": 2e-4, "logging_steps": 2},
    base_job_name="example-dpo",
)
second = dpo.train(inputs={"train": data["train"], "validation": data["validation"], "adapter": first.model_uri})

for event in second.metrics():
    if event["kind"] == "train":
        print(f"step {event['step']:3}  loss {event['loss']:.3f}  margin {event['rewards/margins']:+.3f}")
print(second.reading())
print("one adapter for the same base:", second.model_uri)
