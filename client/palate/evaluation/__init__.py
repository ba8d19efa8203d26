"""Evaluates tuned models: answers judged against the base's and other models', preferences held out from the training, gates."""
