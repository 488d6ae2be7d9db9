"""Retention: what the rest of the model keeps, on prompts that name no concept of the run."""
