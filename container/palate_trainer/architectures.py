"""Prints the model types that the installed transformers can train as causal language models. Knows no model and no run."""

from __future__ import annotations

import json

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if __name__ == "__main__":
    print(json.dumps({"version": transformers.__version__, "model_types": sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}))
