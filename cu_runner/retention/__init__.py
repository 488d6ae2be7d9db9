"""Retention: what the rest of the model keeps, on prompts that name no concept of the run. A YAML in conf/retention chooses it."""
