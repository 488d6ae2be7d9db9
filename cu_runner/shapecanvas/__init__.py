"""The embedded world: how its images are drawn, and the weights of its model and evaluators."""
