"""Training: `pipeline.train.train.train(settings)`."""
