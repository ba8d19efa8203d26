"""Trains a small model on the demo data, serves it, and asks it one question. Writes ./palate-demo and cleans up the service."""

from pathlib import Path

from palate import ModelTrainingRecipe
from palate_recipes.demo import write_demo

data = write_demo(Path("palate-demo"), per_topic=2)  # 68 pairs; put your own file in place of data["train"]

recipe = ModelTrainingRecipe(
    model_name="smollm2-135m-instruct",
    method="LoRA_LLM",
    hyperparameters={"training_strategy": "dpo", "loss_type": "sigmoid,sft", "learning_rate": 1e-3},
)
recipe.train(inputs={"train": data["train"]})
with recipe.deploy(service_name="five_lines") as predictor:  # deleted at the end of the block, after an error too
    answer = predictor.openai().chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Chess is pure talent, so practice is a waste of time, right?"}],
        max_tokens=80,
    )
    print(answer.choices[0].message.content)
