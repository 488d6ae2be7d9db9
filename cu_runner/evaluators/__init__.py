"""Evaluators name the content of images: one file and one YAML each; with them, what is measured."""
