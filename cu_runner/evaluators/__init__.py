"""Evaluators: what names the content of generated images. One file here and one YAML in conf/evaluator make one."""
