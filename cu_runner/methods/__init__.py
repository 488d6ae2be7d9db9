"""Unlearning methods: a file and a YAML of conf/method each; `_name` is shared and holds none."""
