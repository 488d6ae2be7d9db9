"""Evaluators name the content of images, one file and one YAML each; and what is measured."""
