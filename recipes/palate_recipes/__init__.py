"""What Palate knows as data: models, hyperparameters, demo preferences. Imports nothing else of Palate's."""
