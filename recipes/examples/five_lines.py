"""Trains a small model on the demo data, serves it, and asks it one question. Writes ./palate-demo and cleans up the service."""

from pathlib import Path

from palate import ModelTrainingRecipe
from palate_recipes.demo import write_demo

data = write_demo(Path("palate-demo"), per_topic=2)  # 68 pairs; put your own file in place of data["train"]

recipe = ModelTrainingRecipe(
    model_name="smollm2-135m-instruct",
    method="LoRA_LLM",
    hyperparameters={
        "training_strategy": "dpo",
        "loss_type": "sigmoid,sft",  # DPO plus the likelihood of the chosen answer
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,  # 68 pairs: 17 steps
        "gradient_accumulation_steps": 1,
    },
)
recipe.train(inputs={"train": data["train"]})
# This engine starts in ten seconds on a CPU; leave the option out to use vLLM where it is installed.
# The service is deleted at the end of the block, after an error too.
with recipe.deploy(service_name="five_lines", options={"engine": "transformers"}) as predictor:
    answer = predictor.openai().chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": recipe.hyperparameters["system_prompt"]},  # as in training
            {"role": "user", "content": "Chess is pure talent, so practice is a waste of time, right?"},
        ],
        max_tokens=80,
        temperature=0,
    )
    print(answer.choices[0].message.content)
