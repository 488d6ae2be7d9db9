"""Unlearning methods: one file and one YAML of the same name in conf/method each."""
