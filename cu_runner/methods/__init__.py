"""Unlearning methods. One file here and one YAML of the same name in conf/method make a method; nothing else has to know."""
