"""A script for Alibaba PAI's SDK with its import root changed from `pai` to `palate`.

    python from_pai.py TRAINING_FILE

The file may be local or oss://, s3://. `palate run` runs such a script without even that change. `options` is Palate's own here and
may be left out: this engine starts in ten seconds on a CPU.
"""

import sys

from palate.common.utils import random_str
from palate.model import ModelTrainingRecipe
from palate.session import get_default_session

session = get_default_session()

recipe = ModelTrainingRecipe(
    model_name="smollm2-135m-instruct",
    model_provider="pai",
    method="LoRA_LLM",
    hyperparameters={
        "training_strategy": "dpo",
        "learning_rate": "5e-5",
        "num_train_epochs": "1",
        "per_device_train_batch_size": "4",
        "seq_length": "256",
        "dpo_beta": "0.1",
    },
)
recipe.train(inputs={"train": sys.argv[1]})
print("model data:", recipe.model_data())

predictor = recipe.deploy(service_name=f"smollm2_dpo_{random_str(6)}", options={"engine": "transformers"})
try:
    openai = predictor.openai()
    response = openai.chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": "You are a helpful assistant"},
            {"role": "user", "content": "Is a tomato a fruit?"},
        ],
        max_tokens=40,
    )
    print(response.choices[0].message.content)
finally:
    predictor.delete_service()
