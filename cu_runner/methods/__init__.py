"""Unlearning methods: one file and one YAML of conf/method each; `_name` is shared and holds none."""
